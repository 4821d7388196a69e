"""The wire's answers: specification, goldens, and everything that can happen to bytes on the way."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest

from teacher_proto.errors import (
    ChecksumError,
    EngineError,
    InvalidTargetsError,
    TruncatedError,
    VersionError,
    WireError,
)
from teacher_proto.request_checks import parse_body
from teacher_proto.requests import Limits, TargetsRequest
from teacher_proto.targets import TENSORS, check_targets
from teacher_proto.wire import records as wire
from teacher_proto.wire.records import TARGETS_FORMAT, Header
from teacher_proto.wire.responses import (
    End,
    Failure,
    Progress,
    ResponseDecoder,
    Targets,
    encode_end,
    encode_failure,
    encode_progress,
)
from teacher_proto.wire.tensors import decode_tensor, encode_tensor
from tests.unit.proto.fake_teacher import same_bits
from tests.unit.proto.records import Message, all_kinds, json_message, make_body, make_header, make_record, make_request

GOLDEN = Path(__file__).parents[2] / "golden" / "wire_v1"
SPECIFICATION = Path(wire.__file__).parents[1] / "WIRE.md"


def decode(body: bytes, piece: int | None = None) -> list[Message]:
    decoder = ResponseDecoder(TARGETS_FORMAT)
    piece = piece or max(len(body), 1)
    messages = [m for at in range(0, len(body), piece) for m in decoder.feed(body[at : at + piece])]
    decoder.close()
    return messages


def encode(message: Message, vocab_size: int) -> bytes:
    if isinstance(message, Header):
        return wire.encode_header(message)
    if isinstance(message, Targets):
        return wire.encode_targets(message.index, message.targets, vocab_size)
    if isinstance(message, Failure):
        return encode_failure(message.index, message.error)
    return encode_end(message.num_sequences)


def hex_blocks() -> list[bytes]:
    blocks = re.findall(r"```hex\n(.*?)```", SPECIFICATION.read_text(), re.DOTALL)
    return [
        bytes.fromhex("".join(line.partition(";")[0].partition("  ")[2] for line in block.splitlines()))
        for block in blocks
    ]


def test_specification_shows_the_bytes_of_a_request_and_its_answer() -> None:
    request_bytes, answer_bytes = hex_blocks()
    fields = wire.decode_request(request_bytes, _limits(4))
    request = parse_body(TargetsRequest, fields)
    assert wire.encode_request(request) == request_bytes == (GOLDEN / "example_request.msgpack").read_bytes()
    header, targets, end = decode(answer_bytes)
    assert isinstance(header, Header) and isinstance(targets, Targets) and isinstance(end, End)
    check_targets(targets.targets, request.query(0), header.vocab_size)
    assert b"".join(encode(m, 4) for m in (header, targets, end)) == answer_bytes
    assert answer_bytes == (GOLDEN / "example_answer.msgpack").read_bytes()


def test_example_has_the_probabilities_that_the_specification_says() -> None:
    _, answer_bytes = hex_blocks()
    targets = decode(answer_bytes)[1].targets
    np.testing.assert_allclose(targets.probabilities(), [[0.5, 0.25]] * 3, rtol=1e-3)
    at_two = np.sqrt([0.5, 0.25, 0.125, 0.125])
    np.testing.assert_allclose(targets.probabilities(0, 2.0), [(at_two / at_two.sum())[:2]] * 3, rtol=1e-3)


def test_specification_lists_every_tensor_in_the_order_of_the_checksum() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (?:top_k|score|gather|sampled|hidden|all)", SPECIFICATION.read_text(), re.M)
    assert listed == list(TENSORS)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.answer.msgpack")), ids=lambda path: path.name)
def test_golden_answers_of_version_1_decode_to_what_they_did(path: Path) -> None:
    body = path.read_bytes()
    messages = decode(body)
    assert json.loads(json.dumps([json_message(m) for m in messages])) == json.loads(
        path.with_suffix(".json").read_text()
    )
    vocab_size = messages[0].vocab_size
    assert b"".join(encode(m, vocab_size) for m in messages) == body
    request = parse_body(
        TargetsRequest,
        wire.decode_request(Path(str(path).replace("answer", "request")).read_bytes(), _limits(vocab_size)),
    )
    for message in messages:
        if isinstance(message, Targets):
            check_targets(message.targets, request.query(message.index), vocab_size)


def test_there_are_golden_answers() -> None:
    assert len(list(GOLDEN.glob("*.answer.msgpack"))) >= 3


@pytest.mark.parametrize(("vocab_size", "hidden_dtype"), [(300, "int8"), (70_000, "float16"), (300, "bfloat16")])
@pytest.mark.parametrize("piece", [None, 1, 7, 1000])
def test_answers_come_back_bit_for_bit_however_they_are_cut(vocab_size: int, hidden_dtype: str, piece: int) -> None:
    request = all_kinds(vocab_size, hidden_dtype)
    header, *answers, end = decode(make_body(request, vocab_size), piece)
    assert header == make_header(request, vocab_size) and end == End(2)
    for answer in answers:
        assert same_bits(answer.targets, make_record(request, answer.index, vocab_size))
        check_targets(answer.targets, request.query(answer.index), vocab_size)


def test_any_msgpack_library_reads_an_answer() -> None:
    request = make_request(temperatures=(2.0,))
    messages = list(_plain_unpack(make_body(request)))
    record = make_record(request)
    message = messages[1]
    data = [message[name]["data"] for name in ("ids", "logprobs", "lse", "next_logprob", "log_z")]
    assert zlib.crc32(b"".join(data)) == message["checksum"]
    ids = np.frombuffer(message["ids"]["data"], message["ids"]["dtype"]).reshape(message["ids"]["shape"])
    np.testing.assert_array_equal(ids, record.ids)


def test_three_byte_ids_are_the_low_bytes_of_each_id() -> None:
    ids = np.array([[0, 1, 65_536], [2**24 - 1, 70_001, 255]], dtype=np.int32)
    tensor = encode_tensor(ids, "u3")
    expected = b"".join(struct.pack("<I", i)[:3] for i in ids.reshape(-1).tolist())
    assert bytes(tensor["data"]) == expected and tensor["shape"] == [2, 3]
    back = decode_tensor({**tensor, "data": expected})
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, ids)


@pytest.mark.parametrize("size", range(9))
def test_three_byte_ids_of_any_number(size: int) -> None:
    ids = np.arange(size, dtype=np.int32) * 1_864_135
    tensor = encode_tensor(ids, "u3")
    assert len(tensor["data"]) == 3 * size
    np.testing.assert_array_equal(decode_tensor({**tensor, "data": bytes(tensor["data"])}), ids)


def test_big_endian_arrays_travel_little_endian() -> None:
    tensor = encode_tensor(np.array([1.5, -2.0], dtype=">f4"))
    assert tensor["dtype"] == "<f4" and bytes(tensor["data"]) == struct.pack("<2f", 1.5, -2.0)


@pytest.mark.parametrize(
    ("array", "dtype"), [([2**24], "u3"), ([-1], "u3"), ([65_536], "<u2"), ([2**31], "<i4"), ([-1], "<u4")]
)
def test_integers_that_do_not_fit_are_not_wrapped(array: list[int], dtype: str) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        encode_tensor(np.array(array, dtype=np.int64), dtype)


def test_a_dtype_that_is_not_on_the_wire_is_refused() -> None:
    with pytest.raises(ValueError, match="<f8 is not part of the wire format"):
        encode_tensor(np.zeros(2))


GOOD = {"dtype": "<u2", "shape": [2, 1], "data": b"\x01\x00\x02\x00"}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "<f8"}, {"dtype": "|O"}, {"dtype": ["<u2"]}, {"dtype": None}, {"shape": [1]}, {"shape": [2, 2]},
        {"shape": [-2, -1]}, {"shape": [True, 2]}, {"shape": [2.0, 1]}, {"shape": "21"}, {"shape": [1] * 5},
        {"shape": [2**40, 0]}, {"shape": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1]}, {"shape": None},
        {"data": "text"}, {"data": b""}, {"data": b"\x01\x00\x02"}, {"data": [1, 2]}, {"extra": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_that_does_not_add_up_is_a_wire_error(change: dict) -> None:
    assert decode_tensor(GOOD).tolist() == [[1], [2]]
    with pytest.raises(WireError):
        decode_tensor(GOOD | change)
    with pytest.raises(WireError):
        decode_tensor({"dtype": "<u2", "shape": [1]})


def test_every_truncation_is_told_from_a_whole_body() -> None:
    body = make_body(make_request(lengths=(4, 2), temperatures=(2.0,)))
    for size in range(len(body)):
        with pytest.raises(TruncatedError, match=f"after {size} bytes"):
            decode(body[:size], piece=97)


def test_every_flipped_bit_of_four_kilobytes_is_noticed() -> None:
    """By the decoder, or by what the client compares: the header, and each record with what was asked."""
    request = make_request(lengths=(40, 20), top_k=10, temperatures=(2.0,))
    body = make_body(request)
    assert 3500 < len(body) < 5000
    header = make_header(request)
    for at in range(len(body)):
        for bit in range(8):
            spoilt = bytearray(body)
            spoilt[at] ^= 1 << bit
            try:
                messages = decode(bytes(spoilt))
                for message in messages[1:-1]:
                    check_targets(message.targets, request.query(message.index), 300)
            except (WireError, InvalidTargetsError):
                continue
            assert messages[0] != header, f"bit {bit} of byte {at} went through"


def test_a_changed_byte_of_data_is_a_checksum_error() -> None:
    request = make_request()
    body = bytearray(make_body(request))
    at = body.index(make_record(request).lse.tobytes())
    body[at] ^= 1
    with pytest.raises(ChecksumError, match="corrupted in transit"):
        decode(bytes(body))


def test_failures_keep_their_class_and_fields() -> None:
    error = EngineError("no", field="sequences.0", got=7, limit=3, request_id="r", retryable=True)
    header = make_header(make_request(lengths=(2,)))
    _, failure, _ = decode(wire.encode_header(header) + encode_failure(0, error) + encode_end(1))
    assert type(failure.error) is EngineError and failure.index == 0
    assert failure.error.to_json() == error.to_json()


def test_an_error_message_of_odd_values_can_be_sent() -> None:
    error = EngineError("no", got=float("nan"), limit=np.int64(3))
    failure = next(iter(ResponseDecoder(TARGETS_FORMAT).feed(encode_failure(None, error))))
    assert failure.error.got == "nan" and failure.error.limit == "3"


def test_progress_comes_back_between_header_and_end_and_nowhere_else() -> None:
    progress = Progress(tokens_done=312, tokens=4096, tokens_ahead=100_000, tokens_per_second=20.5)
    message = encode_progress(progress)
    assert len(message) <= 90 and msgpack.unpackb(message)["type"] == "progress"
    request = make_request(lengths=(6,))
    head, record, end = (
        wire.encode_header(make_header(request)), wire.encode_targets(0, make_record(request), 300), encode_end(1)
    )  # fmt: skip
    decoder = ResponseDecoder(TARGETS_FORMAT)
    messages = [*decoder.feed(head + message + record), *decoder.feed(message + end)]
    decoder.close()
    assert [type(one).__name__ for one in messages] == ["Header", "Progress", "Targets", "Progress", "End"]
    assert messages[1] == messages[3] == progress
    for wrong in (message + head, head + record + end + message):
        with pytest.raises(WireError):
            list(ResponseDecoder(TARGETS_FORMAT).feed(wrong))


@pytest.mark.parametrize("change", [{"tokens": -1}, {"tokens_done": "1"}, {"tokens_per_second": math.nan}])
def test_progress_that_cannot_be_is_a_wire_error(change: dict) -> None:
    head = wire.encode_header(make_header(make_request()))
    fields = msgpack.unpackb(encode_progress(Progress(1, 2, 3, 4.0))) | change
    with pytest.raises(WireError, match=next(iter(change))):
        list(ResponseDecoder(TARGETS_FORMAT).feed(head + msgpack.packb(fields)))


def test_another_version_is_refused_with_both_numbers() -> None:
    header = make_header(make_request())
    body = wire.encode_header(Header(**{**vars(header), "version": 2}))
    with pytest.raises(VersionError, match=r"version 2 of the wire format, this client 1") as caught:
        decode(body)
    assert not caught.value.retryable


HEADER = wire.encode_header(make_header(make_request(lengths=(3, 3))))
RECORD = wire.encode_targets(0, make_record(make_request(lengths=(3, 3))), 300)
END = encode_end(2)
FAILED = encode_failure(0, EngineError("x")) + encode_failure(1, EngineError("x"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (RECORD + END, "expected a header"),
        (HEADER + HEADER, "second header"),
        (HEADER + RECORD + RECORD, "sequence 0 twice"),
        (HEADER + wire.encode_targets(2, make_record(make_request()), 300), "sequence 2, expected 0 to 1"),
        (HEADER + RECORD + END, "ends with 1 of 2"),
        (HEADER + encode_failure(0, EngineError("x")) + RECORD, "sequence 0 twice"),
        (HEADER + FAILED + END + END, "follows the end"),
        (msgpack.packb([1, 2]), "expected a map"),
        (msgpack.packb({"type": "surprise"}), "expected a header"),
        (HEADER + msgpack.packb({"type": "surprise"}), "unknown message type"),
        (msgpack.packb({"type": "header", "version": 1}), "num_sequences: got"),
        (msgpack.packb({**msgpack.unpackb(HEADER), "num_sequences": -1}), "num_sequences: got"),
        (msgpack.packb({**msgpack.unpackb(HEADER), "num_sequences": True}), "num_sequences: got"),
        (msgpack.packb({**msgpack.unpackb(HEADER), "temperatures": [float("nan")]}), "not finite numbers"),
        (msgpack.packb({**msgpack.unpackb(HEADER), "request_id": 5}), "lacks request_id"),
        (HEADER + msgpack.packb({**msgpack.unpackb(RECORD), "logits": 1}), "unknown tensors"),
        (HEADER + msgpack.packb({**msgpack.unpackb(RECORD), "start": -1}), "start: got"),
        (HEADER + msgpack.packb({**msgpack.unpackb(RECORD), "checksum": 0}), "corrupted in transit"),
        (HEADER + b"\x82\xa1a\x01\xa1a\x02", "the key 'a' twice"),
        (HEADER + b"\x81\xc4\x01a\x01", "key is memoryview, expected text"),
        (b"\xc1", "type 0xc1"),
        (b"\xc7\x01\x05\x00", "type 0xc7"),
        (b"\x81\x01\x02", "key is int, expected text"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "1024 items in one message"),
        (b"\x81\xa2\xff\xfe\x01", "not UTF-8"),
        (b"\x91" * 3000, "nested more than 6 deep"),
        (b"\x81\xa1a\xdc\x00\x40" + b"\x91\x90" * 64, "64 lists and maps"),
    ],
)  # fmt: skip
def test_what_is_not_an_answer_is_a_wire_error(body: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(body)


def test_a_message_beyond_the_clients_limit_is_not_buffered() -> None:
    decoder = ResponseDecoder(TARGETS_FORMAT, max_message_bytes=10_000)
    with pytest.raises(WireError, match="larger than"):
        list(decoder.feed(b"\x81\xa1a\xc6\x10\x00\x00\x00" + bytes(20_000)))


def _limits(vocab_size: int) -> Limits:
    return Limits(vocab_size=vocab_size, max_sequence_length=512)


def _plain_unpack(body: bytes) -> msgpack.Unpacker:
    unpacker = msgpack.Unpacker(raw=False)
    unpacker.feed(body)
    return unpacker


def test_requests_come_back_as_they_were() -> None:
    rows = ((1, 5), (0, 3))
    gather_ids = tuple(np.arange(4 * (stop - start)).reshape(-1, 4) for start, stop in rows)
    changes = {"rows": rows, "gather_ids": gather_ids, "fingerprint": "a.b", "seed": 12}
    request = all_kinds().model_copy(update=changes)
    back = parse_body(TargetsRequest, wire.decode_request(wire.encode_request(request), _limits(300)))
    for name in TargetsRequest.model_fields:
        ours, theirs = getattr(request, name), getattr(back, name)
        if name in ("sequences", "gather_ids"):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        else:
            assert ours == theirs, name
