"""The attention contract: requests, records, the wire, and the client against a service without sockets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from teacher_proto.attention import (
    AttentionRequest,
    check_attention_request,
    record_entries,
)
from teacher_proto.attention_targets import ATTENTION_TENSORS, AttentionTargets, check_attention
from teacher_proto.client.attention_client import AttentionClient
from teacher_proto.client.sync_client import SyncAttentionClient
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import (
    ChecksumError,
    InvalidTargetsError,
    MalformedError,
    NotFoundError,
    OutOfRangeError,
    PoisonBatchError,
    TeacherUnavailableError,
    TruncatedError,
    WireError,
    WrongTeacherError,
)
from teacher_proto.request_checks import parse_body
from teacher_proto.wire import records as wire
from teacher_proto.wire.attention import ATTENTION_FORMAT, AttentionHeader, encode_attention, encode_attention_header
from teacher_proto.wire.records import decode_request, encode_request
from teacher_proto.wire.responses import ResponseDecoder, encode_end
from tests.unit.proto.attention_records import LIMITS, SHAPE, make_body, make_info, make_record
from tests.unit.proto.fake_teacher import FakeClock, Replica, identity, network, sequences

GOLDEN = Path(__file__).parents[2] / "golden" / "attention_v1"
SPECIFICATION = Path(wire.__file__).parents[1] / "WIRE.md"
TOKENS = tuple(sequences(5, 9))
ROWS = ([0, 4], [2, 3, 8])
REQUESTS = {
    "states": AttentionRequest(sequences=TOKENS),
    "states_int8": AttentionRequest(sequences=TOKENS, dtype="int8", layer=2),
    "relations": AttentionRequest(sequences=TOKENS, kind="relations", relation_heads=4, rows=ROWS),
    "relations_minilm": AttentionRequest(sequences=TOKENS, kind="relations", form="minilm", relation_heads=2),
    "maps": AttentionRequest(sequences=TOKENS, kind="maps", layer=-3),
    "maps_rows": AttentionRequest(sequences=TOKENS, kind="maps", rows=ROWS),
}
each_request = pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)


def decode(body: bytes, piece: int = 1 << 20) -> list[Any]:
    decoder = ResponseDecoder(ATTENTION_FORMAT)
    messages = [m for at in range(0, len(body), piece) for m in decoder.feed(body[at : at + piece])]
    decoder.close()
    return messages


def same_bits(a: AttentionTargets, b: AttentionTargets) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return (a.kind, a.layer, list(ours)) == (b.kind, b.layer, list(theirs)) and all(
        ours[n].dtype == theirs[n].dtype and ours[n].tobytes() == theirs[n].tobytes() for n in ours
    )


@each_request
def test_requests_come_back_from_the_wire(request_: AttentionRequest) -> None:
    fields = decode_request(encode_request(request_), LIMITS, AttentionRequest)
    back = parse_body(AttentionRequest, fields)
    check_attention_request(back, LIMITS, SHAPE)
    assert back.spec(7) == request_.spec(7)
    for name in ("sequences", "rows"):
        ours, theirs = getattr(request_, name), getattr(back, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@each_request
@pytest.mark.parametrize("piece", [1, 37, 1 << 20])
def test_records_come_back_bit_for_bit_and_pass_their_checks(request_: AttentionRequest, piece: int) -> None:
    header, *records, end = decode(make_body(request_), piece)
    spec = request_.spec(SHAPE.num_layers)
    assert (header.layer, header.kind, header.num_layers) == (spec.layer, spec.kind, 7)
    assert end.num_sequences == 2
    for message in records:
        check_attention(message.targets, request_.query(message.index, SHAPE.num_layers), SHAPE)
        assert same_bits(message.targets, make_record(request_, message.index))
        sent = {n: a for n, a in message.targets.tensors().items() if n != "rows" and not n.endswith("scale")}
        assert sum(a.size for a in sent.values()) == record_entries(request_, message.index, SHAPE)


@each_request
def test_every_flipped_bit_and_every_cut_is_noticed(request_: AttentionRequest) -> None:
    body = make_body(request_)
    for size in range(0, len(body) - 1, 17):
        with pytest.raises(TruncatedError):
            decode(body[:size])
    record = encode_attention(0, make_record(request_, 0))
    start = make_body(request_).index(b"\xa9attention")
    header = body[: start - 6]
    binary_at = record.index(b"\xa4data") + 5
    data_at = binary_at + {0xC4: 2, 0xC5: 3}[record[binary_at]]
    for at in range(data_at, data_at + 8):
        flipped = bytearray(record)
        flipped[at] ^= 1
        with pytest.raises(ChecksumError):
            list(ResponseDecoder(ATTENTION_FORMAT).feed(header + bytes(flipped)))


@pytest.mark.parametrize("name", REQUESTS)
def test_golden_answers_of_version_1_decode_to_what_they_did(name: str) -> None:
    body = (GOLDEN / f"{name}.answer.msgpack").read_bytes()
    request = parse_body(
        AttentionRequest, decode_request((GOLDEN / f"{name}.request.msgpack").read_bytes(), LIMITS, AttentionRequest)
    )
    header, *records, _ = decode(body)
    parts = [encode_attention_header(header), *(encode_attention(m.index, m.targets) for m in records)]
    assert b"".join([*parts, encode_end(2)]) == body
    for message in records:
        check_attention(message.targets, request.query(message.index, SHAPE.num_layers), SHAPE)
    assert encode_request(request) == (GOLDEN / f"{name}.request.msgpack").read_bytes()


def test_the_specification_lists_every_tensor_in_the_order_of_the_checksum() -> None:
    listed = re.findall(r"^\| `(\w+)` \| attention:", SPECIFICATION.read_text(), re.M)
    assert listed == list(ATTENTION_TENSORS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer": 6}, NotFoundError, "holds layers 0 to 5.*--layer 6"),
        ({"layer": 9}, NotFoundError, "layers 0 to 6"),
        ({"layer": -8}, NotFoundError, "layers 0 to 6"),
        ({"layer": "last"}, NotFoundError, "'last' is layer 6 of 7"),
        ({"layer": 1.5}, OutOfRangeError, "fraction of the depth"),
        ({"layer": "top"}, OutOfRangeError, "late_middle"),
        ({"layer": True}, OutOfRangeError, "layer"),
        ({"kind": "gradients"}, OutOfRangeError, "states"),
        ({"kind": "relations", "relation_heads": 3}, OutOfRangeError, "one of 1, 2, 4, 8, 16"),
        ({"kind": "relations", "relation_heads": 0}, OutOfRangeError, "expected 1 to 256"),
        ({"kind": "relations", "relation_heads": 2.0}, OutOfRangeError, "relation_heads"),
        ({"kind": "relations", "form": "cosine"}, OutOfRangeError, "official"),
        ({"kind": "relations", "relation_heads": 4, "dtype": "int8"}, OutOfRangeError, "int8 is for states"),
        ({"dtype": "float32"}, OutOfRangeError, "float16"),
        ({"block_size": 4}, OutOfRangeError, "only maps have blocks"),
        ({"kind": "maps", "block_size": 0}, OutOfRangeError, "expected 1 to 64"),
        ({"rows": ROWS}, OutOfRangeError, "the states of all positions"),
        ({"kind": "maps", "rows": ([0],)}, OutOfRangeError, "a list of positions for each sequence"),
        ({"kind": "maps", "rows": ([0], [3, 3])}, OutOfRangeError, "rows.1.*ascending"),
        ({"kind": "maps", "rows": ([5], [3])}, OutOfRangeError, "rows.0.*below 5"),
        ({"kind": "maps", "rows": ([0], [])}, OutOfRangeError, "rows.1: 0 positions"),
        ({"sequences": ([1, 300],)}, OutOfRangeError, "token ids from 0 to 299"),
        ({"sequences": ([0] * 65,)}, OutOfRangeError, "expected 1 to 64"),
        ({"sequences": ([],)}, OutOfRangeError, "0 tokens"),
        ({"top_k": 4}, MalformedError, "unknown field 'top_k'"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_field(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        check_attention_request(parse_body(AttentionRequest, {"sequences": TOKENS} | changes), LIMITS, SHAPE)
    assert caught.value.field.split(".")[0] in {*changes, "relation_heads"}


def test_an_answer_of_too_many_numbers_is_refused_before_it_is_made() -> None:
    limits = LIMITS.model_copy(update={"max_entries": 600})
    request = AttentionRequest(sequences=TOKENS, kind="relations", relation_heads=8)
    with pytest.raises(OutOfRangeError, match=r"sequences\.1: got 1944, .* 600 numbers in its record: request fewer"):
        check_attention_request(request, limits, SHAPE)


def _spoil(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[AttentionTargets], AttentionTargets]:
    def spoil(targets: AttentionTargets) -> AttentionTargets:
        array = getattr(targets, name).copy()
        made = change(array)
        return replace(targets, **{name: array if made is None else made})

    return spoil


def _set(place: Any, value: Any) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(place, value)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("states", _spoil("key", _set((3, 1, 2), np.nan)), "key: NaN"),
        ("states", _spoil("value", _set((3, 1, 2), np.inf)), "value: NaN or infinite"),
        ("states", _spoil("query", lambda a: a * 0), "query: all zero at every position"),
        ("states", _spoil("query", lambda a: a[:-1]), r"query: got float16 of shape \[4, 4, 8\]"),
        ("states", _spoil("key", lambda a: a[:, :1]), "key: got"),
        ("states", _spoil("value", lambda a: a.astype(np.float32)), "value: got float32"),
        ("states", lambda t: replace(t, value=None), "got tensors"),
        ("states", lambda t: replace(t, layer=3), "got states of layer 3"),
        ("states", lambda t: replace(t, kind="maps"), "got maps of layer"),
        ("states_int8", _spoil("key_scale", _set((0, 0, 0), np.nan)), "key_scale"),
        ("states_int8", _spoil("key_scale", _set((0, 0, 0), -1.0)), "key_scale"),
        ("relations", _spoil("key", _set((0, 0, 0), np.nan)), "key: a probability is NaN"),
        ("relations", _spoil("key", _set((0, 0, 0), -0.1)), "below 0"),
        ("relations", _spoil("value", _set((0, 0, 0), 0.9)), "value: the probabilities of a row sum"),
        ("relations", _spoil("query", lambda a: a * 0), "sum to 0"),
        ("relations", _spoil("rows", _set(1, 3)), "rows are not the requested positions"),
        ("relations", lambda t: replace(t, rows=None), "got tensors"),
        ("relations_minilm", _spoil("key", lambda a: a[:, ::-1].copy()), "later position"),
        ("maps", _spoil("maps", lambda a: a.transpose(0, 2, 1).copy()), "sum|later position"),
        ("maps_rows", _spoil("maps", lambda a: a[:, ::-1].copy()), "later position"),
    ],
)
def test_records_that_cannot_be_are_refused(name: str, spoil: Callable[..., Any], message: str) -> None:
    good, query = make_record(REQUESTS[name], 0), REQUESTS[name].query(0, SHAPE.num_layers)
    check_attention(good, query, SHAPE)
    with pytest.raises(InvalidTargetsError, match=message):
        check_attention(spoil(good), query, SHAPE)


class Service:
    """An attention service without sockets; `spoil` changes each record before it is sent."""

    def __init__(self, name: str = "a0", **changes: Any):
        self.url = f"http://{name}:8001"
        self.info = make_info(identity(**changes))
        self.spoil: Callable[[AttentionTargets], AttentionTargets] = lambda targets: targets
        self.posts: list[AttentionRequest] = []
        self.down = False

    def handle(self, http: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("connection refused")
        if http.url.path == "/v1/teacher":
            return httpx.Response(200, json=self.info.model_dump(mode="json"))
        assert http.url.path == "/v1/attention"
        request = parse_body(AttentionRequest, decode_request(http.content, LIMITS, AttentionRequest))
        self.posts.append(request)
        spec = request.spec(SHAPE.num_layers)
        count = len(request.sequences)
        header = AttentionHeader(
            http.headers["x-request-id"], self.info.fingerprint, count, SHAPE.num_layers, spec.layer, spec.kind
        )
        records = [encode_attention(i, self.spoil(make_record(request, i))) for i in range(count)]
        body = b"".join([encode_attention_header(header), *records, encode_end(count)])
        return httpx.Response(200, headers={"content-type": "application/msgpack"}, content=body)


def client_of(*services: Service | Replica, **arguments: Any) -> AttentionClient:
    urls = [service.url for service in services]
    return AttentionClient(urls, transport=network(*services), timing=FakeClock().timing(), **arguments)  # type: ignore[arg-type]


@each_request
async def test_the_client_gives_what_the_service_has(request_: AttentionRequest) -> None:
    async with client_of(service := Service()) as client:
        answers = await client.attention(request_)
    assert all(same_bits(answer, make_record(request_, i)) for i, answer in enumerate(answers))
    assert service.posts[0].fingerprint == service.info.fingerprint


def test_the_synchronous_client_gives_the_same() -> None:
    service = Service()
    with SyncAttentionClient(service.url, transport=network(service)) as client:  # type: ignore[arg-type]
        assert client.teacher(1.0).shape == SHAPE
        assert same_bits(client.attention(REQUESTS["states"])[1], make_record(REQUESTS["states"], 1))


async def test_a_service_of_the_same_weights_is_taken_whatever_its_engine() -> None:
    async with client_of(Service(engine="transformers", device="cuda"), beside=identity(engine="vllm")) as client:
        await client.attention(REQUESTS["states"])
        assert client.stats.numeric_changes == 0


@pytest.mark.parametrize("as_text", [False, True])
async def test_a_service_of_other_weights_is_refused_with_what_differs(as_text: bool) -> None:
    teacher = identity(weights={"a.safetensors": "other"}, dtype="bfloat16")
    async with client_of(service := Service(), beside=teacher.fingerprint if as_text else teacher) as client:
        with pytest.raises(WrongTeacherError, match="does not hold the teacher's model") as caught:
            await client.attention(REQUESTS["states"])
    if not as_text:
        assert "semantic.dtype: expected bfloat16, got float32" in caught.value.message
        assert "semantic.weights.a.safetensors: expected other, got w" in caught.value.message
    assert "numeric" not in caught.value.message
    assert not service.posts


async def test_a_request_for_another_teacher_is_refused_before_it_is_sent() -> None:
    request = REQUESTS["states"].model_copy(update={"fingerprint": identity(revision="2").fingerprint})
    async with client_of(service := Service()) as client:
        with pytest.raises(WrongTeacherError, match="--dtype"):
            await client.attention(request)
    assert not service.posts


async def test_a_layer_that_is_not_there_is_refused_before_it_is_sent() -> None:
    async with client_of(service := Service()) as client:
        with pytest.raises(NotFoundError, match="holds layers 0 to 5"):
            await client.attention(REQUESTS["states"].model_copy(update={"layer": 6}))
    assert not service.posts


async def test_nonsense_of_two_replicas_ends_the_call_with_both_named() -> None:
    services = [Service("a0"), Service("a1")]
    for service in services:
        service.spoil = _spoil("query", lambda array: array * 0)
    async with client_of(*services) as client:
        with pytest.raises(PoisonBatchError, match=r"a0.*all zero|a1.*all zero"):
            await client.attention(REQUESTS["states"])


async def test_a_healthy_replica_answers_for_one_that_is_down() -> None:
    first, second = Service("a0"), Service("a1")
    first.down = True
    async with client_of(first, second) as client:
        assert len(await client.attention(REQUESTS["states"])) == 2


async def test_nobody_there_says_what_to_start() -> None:
    service = Service()
    service.down = True
    async with client_of(service) as client:
        with pytest.raises(TeacherUnavailableError, match=r"no attention service was available.*stillhouse-attention"):
            await client.attention(REQUESTS["states"], deadline_s=1.0)


async def test_each_client_says_so_when_it_meets_the_other_service() -> None:
    teacher, service = Replica(), Service()
    async with client_of(teacher) as client:
        with pytest.raises(WireError, match="got a service of kind 'teacher', expected one of kind 'attention'"):
            await client.teacher()
    async with TeacherClient(service.url, transport=network(service)) as other:  # type: ignore[arg-type]
        with pytest.raises(WireError, match="got a service of kind 'attention', expected one of kind 'teacher'"):
            await other.teacher()
