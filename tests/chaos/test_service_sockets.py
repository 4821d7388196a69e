"""Clients that leave, lie, trickle or say nothing, on raw sockets against a real teacher process."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import pytest_asyncio

from tests.chaos.crowd import ask, gauge, percentile, request_body, until_admitted, until_gauge
from tests.teacher_process import TeacherProcess

MIB = 2**20
HEAD = "POST /v1/targets HTTP/1.1\r\nHost: teacher\r\nContent-Type: application/msgpack\r\n"
WHOLE = request_body(16)
KEEP_S = 2.0


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    options = ("--body-timeout", "3", "--window", "256", "--keep-time", str(KEEP_S))
    with TeacherProcess(*options, script={"hang_token": 0}) as process:
        yield process


@pytest_asyncio.fixture
async def client(teacher: TeacherProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
        yield client


Socket = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(teacher: TeacherProcess) -> Socket:
    return await asyncio.open_connection(teacher.host, teacher.port)


Hang = Callable[[Iterable[int]], Awaitable[list[Socket]]]


@pytest_asyncio.fixture
async def hang(teacher: TeacherProcess) -> AsyncIterator[Hang]:
    """Sends requests of 64 tokens that the engine never finishes, one a socket and number; hangs up after the test."""
    sockets: list[Socket] = []

    async def send(numbers: Iterable[int]) -> list[Socket]:
        before = len(sockets)
        for number in numbers:
            sockets.append(await connect(teacher))
            body = request_body(64, seed=number, first=0)
            sockets[-1][1].write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return sockets[before:]

    yield send
    for _, writer in sockets:
        writer.transport.abort()


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one response with a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status_line.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


def peak_rss(teacher: TeacherProcess) -> int:
    """Largest resident size so far, in bytes."""
    status = Path(f"/proc/{teacher.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


async def counter(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"stillhouse_{name}_total{{"))


async def test_clients_that_leave_free_queue_and_permits_and_the_engine_after_the_keep_time(
    client: httpx.AsyncClient, hang: Hang
) -> None:
    # 200 sequences of 64 tokens that never finish: the engine is handed 4 of them, the others queue.
    handed_before, aborted_before = await counter(client, "engine_sequences"), await counter(client, "engine_aborted")
    running = await hang(range(4))
    await until_gauge(client, "engine_tokens", lambda value: value == 256)
    queued = await hang(range(4, 200))
    await until_admitted(client, 200)
    assert await counter(client, "engine_sequences") - handed_before == 4
    left = time.monotonic()
    for _, writer in queued:
        writer.transport.abort()
    await until_gauge(client, "admitted_requests", lambda value: value == 4)
    queued_took = time.monotonic() - left
    assert await counter(client, "engine_aborted") == aborted_before
    left = time.monotonic()
    for _, writer in running:
        writer.transport.abort()
    await until_gauge(client, "admitted_requests", lambda value: value == 0)
    took = time.monotonic() - left
    await until_gauge(client, "engine_tokens", lambda value: value == 0)
    print(f"196 clients left the queue: permits back after {1000 * queued_took:.0f} ms; 4 left the engine: permits "
          f"back after {1000 * took:.0f} ms, the engine free after {time.monotonic() - left:.1f} s")  # fmt: skip
    assert took < 2.5 and queued_took < 2.5
    assert await gauge(client, "admitted_cost") == 0 and await gauge(client, "queue_tokens") == 0
    assert await counter(client, "engine_sequences") - handed_before == 4
    assert await counter(client, "engine_aborted") - aborted_before == 4
    assert await counter(client, "outlived") >= 4
    assert (await ask(client, WHOLE)).whole


async def test_one_client_that_leaves_is_noticed_within_a_quarter_of_a_second(
    client: httpx.AsyncClient, hang: Hang
) -> None:
    times = []
    for number in range(10):
        ((reader, writer),) = await hang([number])
        await until_admitted(client, 1)
        left = time.monotonic()
        writer.close()
        await until_gauge(client, "admitted_requests", lambda value: value == 0)
        times.append(time.monotonic() - left)
        assert not await _read(reader)
    print(f"permits back {1000 * percentile(times, 0.5):.0f} ms after its client left, at most "
          f"{1000 * max(times):.0f} ms")  # fmt: skip
    assert percentile(times, 0.5) < 0.25


FRAMINGS = {
    "declared": f"{HEAD}Content-Length: {2**30}\r\n\r\n",
    "declared beyond 64 bits": f"{HEAD}Content-Length: {'9' * 30}\r\n\r\n",
    "chunked": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n",
    "gzip": f"{HEAD}Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunked JSON": HEAD.replace("msgpack", "json") + "Transfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("name", FRAMINGS)
async def test_a_huge_body_is_refused_and_never_held(teacher: TeacherProcess, name: str) -> None:
    before = peak_rss(teacher)
    reader, writer = await connect(teacher)
    writer.write(FRAMINGS[name].encode())
    chunk = b"\x00" * MIB
    framed = b"100000\r\n" + chunk + b"\r\n" if "chunked" in FRAMINGS[name] else chunk
    sent = 0
    response = asyncio.create_task(read_response(reader))
    try:
        while sent < 2**30:
            writer.write(framed)
            await asyncio.wait_for(writer.drain(), 5)
            sent += MIB
    except (ConnectionError, TimeoutError):
        pass
    status, _, body = await response
    answer = json.loads(body)
    grown = peak_rss(teacher) - before
    print(f"{name}: {status} after {sent / MIB:.0f} MiB were taken, peak memory + {grown / MIB:.1f} MiB")
    expected = {"gzip": (415, "unsupported_type"), "declared beyond 64 bits": (400, "malformed")}
    assert (status, answer["code"]) == expected.get(name, (413, "too_large"))
    assert answer["retryable"] is False and answer["field"]
    assert grown < 16 * MIB + 10 * MIB
    writer.transport.abort()


async def test_a_body_one_byte_over_the_limit_is_refused_and_one_at_it_is_read(client: httpx.AsyncClient) -> None:
    at = await client.post("/v1/targets", content=b"\x00" * 16 * MIB, headers={"Content-Type": "application/msgpack"})
    over = await client.post(
        "/v1/targets", content=b"\x00" * (16 * MIB + 1), headers={"Content-Type": "application/msgpack"}
    )
    assert at.status_code == 400 and over.status_code == 413
    assert (over.json()["got"], over.json()["limit"]) == (16 * MIB + 1, 16 * MIB)


async def test_a_body_longer_than_declared_is_not_taken_for_another_request(teacher: TeacherProcess) -> None:
    reader, writer = await connect(teacher)
    writer.write(f"{HEAD}Content-Length: {len(WHOLE)}\r\n\r\n".encode() + WHOLE + b"\x00" * 100)
    everything = await asyncio.wait_for(reader.read(), 15)
    assert b"HTTP/1.1 400" in everything and everything.count(b"HTTP/1.1 200") <= 1
    writer.close()


async def test_two_lengths_that_differ_are_refused(teacher: TeacherProcess) -> None:
    for lengths in ("Content-Length: 3\r\nContent-Length: 5", "Content-Length: 3\r\nTransfer-Encoding: chunked"):
        reader, writer = await connect(teacher)
        writer.write(f"{HEAD}{lengths}\r\n\r\n".encode() + b"0\r\n\r\n")
        status, _, body = await read_response(reader)
        assert status == 400 and json.loads(body)["code"] == "malformed"
        writer.close()


async def test_a_trickled_body_gets_408_at_its_deadline(teacher: TeacherProcess) -> None:
    reader, writer = await connect(teacher)
    writer.write(f"{HEAD}Content-Length: 1000\r\n\r\n".encode())
    response = asyncio.create_task(read_response(reader))
    started = time.monotonic()
    while not response.done() and time.monotonic() - started < 15:
        writer.write(b"\x00")
        await asyncio.sleep(0.1)
    status, _, body = await response
    took = time.monotonic() - started
    print(f"408 after {took:.2f} s of a limit of 3 s")
    answer = json.loads(body)
    assert (status, answer["code"], answer["retryable"]) == (408, "slow_body", True)
    assert 2.5 < took < 10
    writer.close()


async def test_long_headers_are_refused(teacher: TeacherProcess) -> None:
    reader, writer = await connect(teacher)
    writer.write(b"GET /health/live HTTP/1.1\r\n" + b"X-Filler: 1234567890\r\n" * 4000)
    status, _, body = await read_response(reader)
    assert status == 400 and json.loads(body)["code"] == "malformed"
    writer.close()


async def test_500_slow_and_idle_sockets_are_closed_and_the_others_served(
    teacher: TeacherProcess, client: httpx.AsyncClient
) -> None:
    calm = [(await ask(client, request_body(16, seed=n))).seconds for n in range(100)]
    beginnings = [b"", b"GET /health/live HTTP/1.1\r\nX-Slow: ", f"{HEAD}Content-Length: 100\r\n\r\n".encode()]
    opened = time.monotonic()
    pairs = []
    for number in range(500):
        reader, writer = await connect(teacher)
        writer.write(beginnings[number % 3])
        pairs.append((reader, writer))
    stop = asyncio.Event()

    async def trickle() -> None:
        # A byte a socket every half second, some sockets at a time: slow clients keep no common time.
        while not stop.is_set():
            for number, (_, writer) in enumerate(pairs):
                if number % 3 and not writer.transport.is_closing():
                    writer.write(b"x")
                if number % 25 == 0:
                    await asyncio.sleep(0.025)

    async def closed(reader: asyncio.StreamReader) -> float:
        while await _read(reader):
            pass
        return time.monotonic() - opened

    trickling = asyncio.create_task(trickle())
    ends = asyncio.gather(*(closed(reader) for reader, _ in pairs))
    busy = [(await ask(client, request_body(16, seed=100 + n))) for n in range(100)]
    times = await asyncio.wait_for(ends, 30)
    stop.set()
    await trickling
    p99_calm, p99_busy = percentile(calm, 0.99), percentile([outcome.seconds for outcome in busy], 0.99)
    print(f"500 sockets closed within {max(times):.1f} s; p99 of others {1000 * p99_calm:.1f} ms calm, "
          f"{1000 * p99_busy:.1f} ms meanwhile")  # fmt: skip
    assert all(outcome.whole for outcome in busy)
    assert max(times) < 15
    assert psutil.Process(teacher.pid).num_fds() < 100
    for _, writer in pairs:
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(65_536)
    except ConnectionError:
        return b""


async def test_a_client_that_reads_nothing_is_dropped() -> None:
    with TeacherProcess("--stall-timeout", "2") as teacher:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.connect((teacher.host, teacher.port))
        body = request_body(2048, sequences=8, top_k=256)
        listener.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        async with httpx.AsyncClient(base_url=teacher.url, timeout=30) as client:
            await until_admitted(client, 1)
            await until_gauge(client, "admitted_requests", lambda value: value == 0)
        listener.close()

        def ends() -> list[str]:
            return [event["reason"] for event in teacher.events("request") if event["route"] == "/v1/targets"]

        async with asyncio.timeout(30):
            while not ends():  # noqa: ASYNC110 - the log's line comes after the gauge has fallen
                await asyncio.sleep(0.01)
        assert ends() == ["disconnect"]
