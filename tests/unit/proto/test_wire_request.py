"""Request bodies from strangers, as msgpack and as JSON: what is read, what is refused, and what it may cost."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest

from teacher_proto.errors import OutOfRangeError, TruncatedError, WireError
from teacher_proto.request_checks import parse_body
from teacher_proto.requests import Limits, TargetsRequest, check_request
from teacher_proto.wire.as_json import decode_json_request
from teacher_proto.wire.reader import MAX_DEPTH, MAX_TEXT, Budget, read_message
from teacher_proto.wire.records import decode_request, encode_request
from teacher_proto.wire.tensors import encode_tensor
from tests.unit.proto.records import all_kinds

LIMITS = Limits(vocab_size=300, max_sequence_length=512)
BUDGET = Budget(containers=100, items=10_000)


def pack(value: Any) -> bytes:
    return msgpack.packb(value)


@contextmanager
def traced() -> Iterator[list[int]]:
    """Peak of traced memory in bytes, as the list's one item, when the block is left."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63, 2**64 - 1,
        -1, -32, -33, -128, -129, -(2**15), -(2**15) - 1, -(2**31), -(2**31) - 1, -(2**63),
        0.0, -1.5, 1e300, float("inf"), "", "é" * 20, "x" * 40, "x" * 300, "x" * MAX_TEXT, b"", b"12", b"1" * 300,
        b"1" * 70_000, [], [1], {}, {"a": {"b": [None, {"c": -1}]}}, [[1, 2], ["x"]], list(range(8)),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_reads_what_the_library_writes(value: Any) -> None:
    read = read_message(pack(value), BUDGET)
    assert (bytes(read) if isinstance(read, memoryview) else read) == value
    assert type(read) is type(value) or isinstance(read, memoryview)


def test_reads_single_precision() -> None:
    assert read_message(msgpack.packb(1.5, use_single_float=True), BUDGET) == 1.5


def test_lists_of_token_ids_become_arrays() -> None:
    ids = [0, 127, 128, 255, 256, 65_535, 65_536, 2**31, 2**32 - 1]
    read = read_message(pack(ids), BUDGET)
    assert isinstance(read, np.ndarray) and read.dtype == np.int64 and read.tolist() == ids
    for strange in (-1, 2**32, 1.0, "1", None, True):
        assert read_message(pack([*ids, strange]), BUDGET) == [*ids, strange]


def test_binaries_are_views_of_the_body() -> None:
    body = pack({"data": b"x" * 1000})
    assert np.shares_memory(np.frombuffer(read_message(body, BUDGET)["data"], np.uint8), np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the value at byte 0"),
        (b"\xc1", "0xc1"),
        (b"\xd4\x01\x00", "0xd4"),
        (b"\xc7\x01\x05\x00", "0xc7"),
        (b"\xd7\xff" + bytes(8), "0xd7"),
        (pack(1) + b"\x00", "1 bytes follow"),
        (b"\x82\xa1a\x01\xa1a\x02", "twice"),
        (b"\x81\x01\x02", "key is int"),
        (b"\x81\xc4\x01a\x02", "key is memoryview"),
        (b"\x81\x90\x02", "key is list"),
        (b"\xa2\xff\xfe", "not UTF-8"),
        (b"\x91" * MAX_DEPTH + b"\x91\x90", "deep"),
        (b"\x90" * 0 + b"\xdc\x00\x65" + b"\x90" * 101, "lists and maps"),
        (pack([[0] * 5000] * 3), "items in one message"),
        (pack("x" * (MAX_TEXT + 1)), f"a text of {MAX_TEXT + 1} bytes"),
        (b"\xdb" + struct.pack(">I", 2**32 - 1), "a text of 4294967295 bytes"),
    ],
)
def test_what_is_not_the_wires_msgpack_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        read_message(body, BUDGET)


@pytest.mark.parametrize(
    ("head", "size"),
    [(b"\xdd", 2**32 - 1), (b"\xdf", 2**32 - 1), (b"\xc6", 2**32 - 1), (b"\xdb", MAX_TEXT)],
    ids=["list", "map", "binary", "text"],
)
def test_a_size_without_its_content_is_a_truncation_and_allocates_nothing(head: bytes, size: int) -> None:
    with traced() as peak, pytest.raises(TruncatedError):
        read_message(b"\x91" + head + struct.pack(">I", size) + b"\x01" * 20, Budget(10**9, 10**12))
    assert peak[0] < 50_000


def test_every_truncation_of_a_request_is_noticed() -> None:
    body = encode_request(all_kinds())
    for size in range(len(body)):
        with pytest.raises(TruncatedError):
            decode_request(body[:size], LIMITS)


def test_sequences_come_as_lists_or_tensors_of_any_integer_dtype() -> None:
    ids = list(range(200, 220))
    forms: list[Any] = [ids] + [
        {**encode_tensor(np.array(ids), dtype), "data": bytes(encode_tensor(np.array(ids), dtype)["data"])}
        for dtype in ("<i4", "<u4", "<u2", "u3", "|u1")
    ]
    request = parse_body(TargetsRequest, decode_request(pack({"sequences": forms}), LIMITS))
    assert [tokens.tolist() for tokens in request.sequences] == [ids] * 6
    assert all(tokens.dtype == np.int64 and not tokens.flags.writeable for tokens in request.sequences)


def test_gathered_ids_come_as_lists_of_lists_too() -> None:
    ids = [[1, 2], [3, 4]]
    for inner in (ids, [list(range(20))] * 2):
        fields = decode_request(pack({"sequences": [[5, 6]], "kinds": ["gather"], "gather_ids": [inner]}), LIMITS)
        request = parse_body(TargetsRequest, fields)
        check_request(request, LIMITS)
        assert request.gather_ids is not None and request.gather_ids[0].tolist() == inner


def test_long_lists_in_other_fields_stay_lists() -> None:
    fields = decode_request(pack({"sequences": [[1]], "temperatures": list(range(1, 11))}), LIMITS)
    assert fields["temperatures"] == list(range(1, 11))
    with pytest.raises(OutOfRangeError, match="10 temperatures"):
        check_request(parse_body(TargetsRequest, fields), LIMITS)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"dtype": "<u2", "shape": [1, 2], "data": bytes(4)}, "got dtype '<u2'"),
        ({"dtype": "<i4", "shape": [1, 2], "data": bytes(7)}, "got 7 bytes of data"),
        ({"dtype": "<i4", "shape": [1, 2]}, "a map of dtype, shape and data"),
    ],
)
def test_a_bad_tensor_of_gathered_ids_names_its_place(tensor: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=f"gather_ids.1: .*{message}"):
        decode_request(pack({"sequences": [[1]], "gather_ids": [None, tensor]}), LIMITS)


def test_a_body_that_is_no_map_is_refused() -> None:
    with pytest.raises(WireError, match="msgpack list, expected a map"):
        decode_request(pack([1, 2]), LIMITS)


def test_far_too_many_tokens_are_refused_before_they_are_widened() -> None:
    tensor = {"dtype": "|u1", "shape": [2**20], "data": bytes(2**20)}
    with pytest.raises(WireError, match="more than twice the 131072 tokens"):
        decode_request(pack({"sequences": [tensor]}), LIMITS)
    with pytest.raises(WireError, match="items in one message"):
        decode_request(pack({"sequences": [[1] * 300_000]}), LIMITS)


GATHERED = {"dtype": "<u4", "shape": [10, 2**17], "data": bytes(5 * 2**20)}
BOMBS = {
    "empty lists": b"\x81\xa9sequences\xdd\x00\x50\x00\x00" + b"\x90" * 0x500000,
    "empty maps": b"\x81\xa9sequences\xdd\x00\x50\x00\x00" + b"\x80" * 0x500000,
    "nested lists": b"\x81\xa9sequences" + b"\x91" * 5_000_000,
    "nested headers": b"\x81\xa9sequences" + b"\xdd\x00\x01\x00\x00" * 1_000_000,
    "small ids": b"\x81\xa9sequences\x91\xdd\x00\x50\x00\x00" + b"\x01" * 0x500000,
    "empty texts": b"\x81\xa5kinds\xdd\x00\x50\x00\x00" + b"\xa0" * 0x500000,
    "keys": b"\xdf\x00\x10\x00\x00" + b"".join(b"\xa4%04x\x01" % (i % 65_536) for i in range(2**20)),
    "one byte ids": pack({"sequences": [{"dtype": "|u1", "shape": [5 * 2**20], "data": bytes(5 * 2**20)}]}),
    "gathered": pack({"sequences": [[1]], "kinds": ["gather"], "gather_ids": [GATHERED]}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_at_most_twice_their_size(name: str) -> None:
    """Beyond the body itself, and with the arrays made of it: three times the body in all."""
    body = BOMBS[name]
    with traced() as peak, pytest.raises((WireError, OutOfRangeError)):
        check_request(parse_body(TargetsRequest, decode_request(body, LIMITS)), LIMITS)
    assert peak[0] <= 2 * len(body) + 100_000


def test_the_largest_honest_bodies_cost_at_most_three_times_their_size_in_all() -> None:
    rows, width = 4096, 256
    gather = {"dtype": "<i4", "shape": [rows, width], "data": bytes(4 * rows * width)}
    tokens = {"dtype": "<i4", "shape": [rows], "data": bytes(4 * rows)}
    body = pack({"sequences": [tokens], "kinds": ["gather"], "gather_ids": [gather]})
    limits = LIMITS.model_copy(update={"max_sequence_length": rows})
    with traced() as peak:
        check_request(parse_body(TargetsRequest, decode_request(body, limits)), limits)
    assert peak[0] <= 2 * len(body) + 100_000


CHILD = """
import resource, sys
from teacher_proto.errors import WireError
from teacher_proto.requests import Limits
from teacher_proto.wire.responses import ResponseDecoder
from teacher_proto.wire.records import decode_request, TARGETS_FORMAT
def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
body = sys.stdin.buffer.read()
limits = Limits(vocab_size=300, max_sequence_length=512)
room = used() + 3 * len(body) + 16 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
decoder = ResponseDecoder(TARGETS_FORMAT, 2 * len(body))
for work in (lambda: decode_request(body, limits), lambda: list(decoder.feed(body))):
    try:
        work()
    except WireError as error:
        print(type(error).__name__, str(error)[:60])
"""


@pytest.mark.parametrize("name", ["empty lists", "nested lists", "nested headers", "small ids", "keys"])
def test_neither_decoder_needs_more_address_space_than_three_bodies(name: str) -> None:
    child = subprocess.run([sys.executable, "-c", CHILD], input=BOMBS[name], capture_output=True, timeout=60)
    assert child.returncode == 0, child.stderr.decode()
    assert len(child.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "JSON list"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"temperatures": [NaN]}', "NaN is not JSON"),
        (b'{"temperatures": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b'{"a": [' + b"[]," * 300_000 + b"1]}", "lists and objects, expected at most"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"fingerprint": "\\ud800"}', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b" " * (2**20 + 1), "bytes of JSON, expected at most"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_not_a_json_request_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode_json_request(body, LIMITS)


def test_json_and_msgpack_requests_are_the_same_request() -> None:
    fields = {"sequences": [[1, 2, 3], [4]], "kinds": ["top_k", "gather"], "top_k": 3, "temperatures": [1, 2.5],
              "gather_ids": [[[1], [2], [3]], [[4]]], "rows": [[0, 3], [0, 1]], "fingerprint": "é.b"}  # fmt: skip
    one = parse_body(TargetsRequest, decode_json_request(json.dumps(fields).encode(), LIMITS))
    two = parse_body(TargetsRequest, decode_request(pack(fields), LIMITS))
    assert encode_request(one) == encode_request(two)
    check_request(one, LIMITS)
