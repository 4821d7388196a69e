"""Bodies made to hurt: they are refused with 400 or 422, in bounded memory, and the event loop goes on turning."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_proto.errors import StillhouseError
from teacher_proto.request_checks import parse_body
from teacher_proto.requests import Limits, TargetsRequest, check_request
from teacher_proto.wire.records import MSGPACK, decode_request
from tests.chaos.crowd import percentile, request_body
from tests.teacher_process import TeacherProcess

MIB = 2**20
SIZE = 16 * MIB - 64
LIMITS = Limits(vocab_size=512, max_sequence_length=2048)


def listed(item: bytes, size: int = SIZE) -> bytes:
    """{"sequences": [item, item, ...]} of `size` bytes."""
    count = size // len(item)
    return b"\x81\xa9sequences\xdd" + struct.pack(">I", count) + item * count


def inner(item: bytes, size: int = SIZE) -> bytes:
    """{"sequences": [[item, item, ...]]}."""
    count = size // len(item)
    return b"\x81\xa9sequences\x91\xdd" + struct.pack(">I", count) + item * count


BOMBS = {
    "empty lists": listed(b"\x90"),
    "empty maps": listed(b"\x80"),
    "small lists": listed(b"\x91\x01"),
    "lists of eight": listed(b"\x98" + b"\x01" * 8),
    "small maps": listed(b"\x81\xa1a\x01"),
    "nested lists": b"\x81\xa9sequences" + b"\x91" * SIZE,
    "nested maps": b"\x81\xa1a" * (SIZE // 3),
    "one long list": inner(b"\x01"),
    "one long list of nil": inner(b"\xc0"),
    "one long list of big numbers": inner(b"\xcf" + b"\xff" * 8),
    "one long list of floats": inner(b"\xcb" + b"\x00" * 8),
    "short strings": listed(b"\xa1a"),
    "long keys": b"\x81\xdb" + struct.pack(">I", SIZE) + b"k" * SIZE,
    "a long string": b"\x81\xa9sequences\xdb" + struct.pack(">I", SIZE) + b"s" * SIZE,
    "a promise of four thousand million": b"\x81\xa9sequences\xdd\xff\xff\xff\xff",
    "a promised map": b"\xdf\xff\xff\xff\xff",
    "extensions": listed(b"\xd4\x01\x00"),
    "timestamps": listed(b"\xd6\xff\x00\x00\x00\x00"),
    "a key twice": b"\x82\xa5top_k\x01\xa5top_k\x02",
    "what follows the end": request_body(8) + b"\xc0" * (SIZE - 200),
    "a tensor of many axes": msgpack.packb({"sequences": [{"dtype": "<i4", "shape": [1] * 60, "data": b"1234"}]}),
    "a tensor of huge shape": msgpack.packb({"sequences": [{"dtype": "<i4", "shape": [2**40, 2**40], "data": b""}]}),
    "a tensor of negative shape": msgpack.packb({"sequences": [{"dtype": "<i4", "shape": [-1, -4], "data": b"1234"}]}),
}


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess() as process:
        yield process


def peak(teacher: TeacherProcess) -> int:
    status = Path(f"/proc/{teacher.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


async def test_bombs_are_refused_in_bounded_memory_and_time(teacher: TeacherProcess) -> None:
    worst = (0.0, "")
    async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as other:
        calm = [await _live(other) for _ in range(50)]
        lags: list[tuple[float, str]] = []
        stop = asyncio.Event()
        name = ""

        async def watch() -> None:
            while not stop.is_set():
                lags.append((await _live(other), name))
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        for name, body in BOMBS.items():
            before = peak(teacher)
            # In a thread, or sending would hold up the loop that measures the teacher's.
            response = await asyncio.to_thread(
                httpx.post, f"{teacher.url}/v1/targets", content=body, headers={"Content-Type": MSGPACK}, timeout=60
            )
            assert response.status_code in (400, 422), (name, response.text)
            assert response.json()["code"] in ("malformed", "out_of_range"), name
            worst = max(worst, ((peak(teacher) - before) / MIB, name))
        stop.set()
        await watching
    lag, slowest = max(lags)
    print(f"bombs of {SIZE / MIB:.0f} MiB: largest growth {worst[0]:.1f} MiB ({worst[1]}); liveness "
          f"{1000 * percentile(calm, 0.5):.1f} ms calm, at most {1000 * lag:.1f} ms meanwhile ({slowest})")  # fmt: skip
    assert worst[0] < 3 * 16
    assert lag < 1.0


async def _live(client: httpx.AsyncClient) -> float:
    started = time.monotonic()
    assert (await client.get("/health/live")).status_code == 200
    return time.monotonic() - started


def decode_fully(body: bytes) -> None:
    """What the service does with a body before the engine hears of it: nothing but our errors may come."""
    with contextlib.suppress(StillhouseError):
        check_request(parse_body(TargetsRequest, decode_request(body, LIMITS)), LIMITS)


KEYS = st.text(max_size=8) | st.binary(max_size=4)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | KEYS,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(KEYS, inside, max_size=4),
    max_leaves=12,
)
FIELD = st.sampled_from(["sequences", "kinds", "top_k", "temperatures", "fingerprint", "rows", "gather_ids",
                         "num_samples", "sample_temperature", "seed", "hidden_dtype", "other"])  # fmt: skip
TENSOR = st.fixed_dictionaries({
    "dtype": st.sampled_from(["<i4", "<u2", "u3", "<f4", "<i8", ">i4", "|u1", "O", ""]) | PLAIN,
    "shape": st.lists(st.integers(-2, 5), max_size=5) | PLAIN, "data": st.binary(max_size=64) | PLAIN,
})  # fmt: skip
VALUES = PLAIN | st.lists(TENSOR | st.lists(st.integers(-5, 600), max_size=12) | PLAIN, max_size=4)


@settings(max_examples=400, deadline=1000, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused_by_name(body: bytes) -> None:
    decode_fully(body)


@settings(max_examples=600, deadline=1000, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.dictionaries(FIELD, VALUES, max_size=6))
def test_arbitrary_fields_are_refused_by_name(fields: dict[str, object]) -> None:
    decode_fully(msgpack.packb(fields))


@settings(max_examples=600, deadline=1000, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 10**6))
def test_a_changed_or_cut_request_is_refused_by_name_or_is_another_request(at: int, byte: int, cut: int) -> None:
    body = bytearray(request_body(20, sequences=3, temperatures=[2.0], rows=[[0, 5], [1, 4], [19, 20]]))
    body[at % len(body)] = byte
    decode_fully(bytes(body))
    decode_fully(bytes(body[: cut % len(body)]))


async def test_arbitrary_bytes_on_the_socket_end_in_400_or_an_end(teacher: TeacherProcess) -> None:
    generator = np.random.default_rng(0)
    starts = [
        b"",
        b"POST /v1/targets HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"PRI * HTTP/2.0\r\n\r\n",
    ]
    for number in range(200):
        reader, writer = await asyncio.open_connection(teacher.host, teacher.port)
        writer.write(starts[number % len(starts)] + generator.bytes(int(generator.integers(1, 300))) + b"\r\n\r\n")
        try:
            answer = await asyncio.wait_for(reader.read(4096), 15)
        except ConnectionError:
            answer = b""
        assert not answer or answer.split()[1] in (b"400", b"401", b"404", b"405"), answer
        writer.transport.abort()
    assert not teacher.events("unforeseen error")
