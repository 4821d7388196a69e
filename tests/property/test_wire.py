"""For any request, record and bytes: what goes in comes out, and nothing but a WireError comes of garbage."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import msgpack
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from teacher_proto.errors import RequestError, WireError
from teacher_proto.request_checks import parse_body
from teacher_proto.requests import KINDS, Limits, TargetsRequest, check_request
from teacher_proto.targets import TENSORS, TokenTargets, check_targets, id_dtype
from teacher_proto.wire.as_json import decode_json_request
from teacher_proto.wire.reader import Budget, read_message
from teacher_proto.wire.records import TARGETS_FORMAT, decode_request, encode_header, encode_request, encode_targets
from teacher_proto.wire.responses import ResponseDecoder, Targets, encode_end
from teacher_proto.wire.tensors import decode_tensor, encode_tensor
from tests.unit.proto.fake_teacher import same_bits
from tests.unit.proto.records import json_message, make_body, make_header, make_record

LIMITS = Limits(vocab_size=300, max_sequence_length=512)
temperatures = st.floats(0.001, 1000.0)


@st.composite
def requests(draw: st.DrawFn, vocab_size: int = 300) -> TargetsRequest:
    """Requests that pass `check_request`, of any kinds, rows and sizes."""
    sequences = draw(st.lists(npst.arrays(np.int64, st.integers(1, 12), elements=st.integers(0, vocab_size - 1)),
                              min_size=1, max_size=4))  # fmt: skip
    rows = None
    if draw(st.booleans()):
        rows = tuple(tuple(sorted(draw(st.permutations(range(len(s) + 1)))[:2])) for s in sequences)
    ranges = rows or [(0, len(s)) for s in sequences]
    kinds = tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, unique=True)))
    width = draw(st.integers(1, 5))
    gather = tuple(
        draw(npst.arrays(np.int64, (b - a, width), elements=st.integers(0, vocab_size - 1))) for a, b in ranges
    )
    return TargetsRequest(
        sequences=tuple(sequences), kinds=kinds, top_k=draw(st.integers(1, 20)), rows=rows,
        temperatures=tuple(draw(st.lists(temperatures, max_size=3))),
        gather_ids=gather if "gather" in kinds else None, num_samples=draw(st.integers(1, 30)),
        sample_temperature=draw(temperatures), seed=draw(st.integers(0, 2**63 - 1)),
        hidden_dtype=draw(st.sampled_from(("float16", "bfloat16", "int8"))),
        fingerprint=draw(st.none() | st.text(max_size=20)),
    )  # fmt: skip


def same_request(a: TargetsRequest, b: TargetsRequest) -> bool:
    def plain(request: TargetsRequest) -> dict[str, Any]:
        fields = {name: getattr(request, name) for name in TargetsRequest.model_fields}
        for name in ("sequences", "gather_ids"):
            fields[name] = None if fields[name] is None else [array.tolist() for array in fields[name]]
        return fields

    return plain(a) == plain(b)


@given(requests())
def test_requests_survive_msgpack(request: TargetsRequest) -> None:
    back = parse_body(TargetsRequest, decode_request(encode_request(request), LIMITS))
    assert same_request(request, back)
    check_request(back, LIMITS)


@given(requests())
def test_requests_survive_json(request: TargetsRequest) -> None:
    body = json.dumps(request.model_dump(mode="python"), default=lambda array: array.tolist())
    assert same_request(request, parse_body(TargetsRequest, decode_json_request(body.encode(), LIMITS)))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests(), st.integers(1, 300))
def test_true_answers_survive_and_pass_every_check(request: TargetsRequest, piece: int) -> None:
    body = make_body(request)
    decoder = ResponseDecoder(TARGETS_FORMAT)
    messages = [m for at in range(0, len(body), piece) for m in decoder.feed(body[at : at + piece])]
    decoder.close()
    answers = [m for m in messages if isinstance(m, Targets)]
    assert [m.index for m in answers] == list(range(len(request.sequences)))
    for message in answers:
        assert same_bits(message.targets, make_record(request, message.index))
        check_targets(message.targets, request.query(message.index), 300)
        json.dumps(json_message(message), allow_nan=False)


@st.composite
def odd_records(draw: st.DrawFn, vocab_size: int) -> TokenTargets:
    """Tensors of any sizes and bits, the wire's dtypes apart: decoding is not what judges them."""
    sizes = {"R": draw(st.integers(0, 3)), "K": draw(st.integers(0, 4)), "T": draw(st.integers(0, 2)),
             "G": draw(st.integers(0, 2)), "M": draw(st.integers(0, 5)), "D": draw(st.integers(0, 3))}  # fmt: skip
    sizes["R+1"] = sizes["R"] + 1
    arrays = {}
    for name in draw(st.lists(st.sampled_from(list(TENSORS)), unique=True)):
        shape = tuple(sizes[axis] for axis in TENSORS[name].axes)
        if name in ("ids", "sampled_ids"):
            dtype = np.uint16 if id_dtype(vocab_size) == "<u2" else np.int32
            top = 2**16 - 1 if dtype is np.uint16 else 2**24 - 1
            arrays[name] = draw(npst.arrays(dtype, shape, elements=st.integers(0, top)))
        else:
            dtype = np.dtype(draw(st.sampled_from(TENSORS[name].dtypes)))
            arrays[name] = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), dtype).reshape(shape) if (
                n := math.prod(shape) * dtype.itemsize) else np.zeros(shape, dtype)  # fmt: skip
    return TokenTargets(start=draw(st.integers(0, 2**32 - 1)), **arrays)


@given(st.sampled_from([4, 65_536, 65_537, 2**24]), st.data())
def test_any_bits_survive_the_wire(vocab_size: int, data: st.DataObject) -> None:
    record = data.draw(odd_records(vocab_size))
    header = make_header(TargetsRequest(sequences=([1],)), vocab_size)
    decoder = ResponseDecoder(TARGETS_FORMAT)
    _, message, _ = decoder.feed(encode_header(header) + encode_targets(0, record, vocab_size) + encode_end(1))
    decoder.close()
    assert same_bits(message.targets, record)


@given(npst.arrays(np.uint32, npst.array_shapes(max_dims=4, min_side=0), elements=st.integers(0, 2**24 - 1)))
def test_three_byte_tensors_survive(array: np.ndarray) -> None:
    tensor = encode_tensor(array, "u3")
    assert len(tensor["data"]) == 3 * array.size
    np.testing.assert_array_equal(decode_tensor({**tensor, "data": bytes(tensor["data"])}), array)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain)
def test_reader_and_library_agree(value: Any) -> None:
    def listed(read: Any) -> Any:
        if isinstance(read, dict):
            return {key: listed(inner) for key, inner in read.items()}
        if isinstance(read, list):
            return [listed(inner) for inner in read]
        if isinstance(read, memoryview):
            return bytes(read)
        return read.tolist() if isinstance(read, np.ndarray) else read

    body = msgpack.packb(value)
    try:
        read = read_message(body, Budget(1000, 10_000))
    except WireError as error:
        assert "deep" in str(error)
    else:
        assert listed(read) == msgpack.unpackb(body)


def decode_both(body: bytes) -> None:
    """Both decoders on `body`; anything but a WireError or a RequestError goes through to the test."""
    with contextlib.suppress(WireError):
        for message in ResponseDecoder(TARGETS_FORMAT).feed(body):
            json_message(message)
    for decode in (decode_request, decode_json_request):
        with contextlib.suppress(WireError, RequestError):
            check_request(parse_body(TargetsRequest, decode(body, LIMITS)), LIMITS)


@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error(body: bytes) -> None:
    decode_both(body)


@given(plain)
def test_any_msgpack_is_a_wire_error(value: Any) -> None:
    decode_both(msgpack.packb(value))


field = st.sampled_from(
    [*TargetsRequest.model_fields, "type", "index", "start", "checksum", *TENSORS, "dtype", "shape", "data", "version"]
)
value = st.recursive(
    plain | st.sampled_from(["header", "targets", "error", "end", "<f2", "u3", "top_k"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(field, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150)
@given(st.dictionaries(field, value, max_size=8))
def test_messages_that_look_alike_are_a_wire_error_or_a_request_error(fields: dict[str, Any]) -> None:
    decode_both(msgpack.packb(fields))
    with contextlib.suppress(TypeError):
        decode_both(json.dumps(fields).encode())


@settings(max_examples=150)
@given(requests(), st.data())
def test_spoilt_bodies_are_wire_errors(request: TargetsRequest, data: st.DataObject) -> None:
    for body in (bytearray(encode_request(request)), bytearray(make_body(request))):
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(body) - 1))
            change = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
            if change == "set":
                body[at] = data.draw(st.integers(0, 255))
            elif change == "cut":
                del body[at : at + data.draw(st.integers(1, 20))]
            elif change == "insert":
                body[at:at] = data.draw(st.binary(min_size=1, max_size=20))
            else:
                body[at:at] = body[at : at + 50]
            if not body:
                break
        decode_both(bytes(body))
