"""Sockets that hold on to a service without a key, or with one and without reading, and never close their own side.

    python -m tests.chaos.hostile '{"host": "127.0.0.1", "port": 8000, "key": "...", "each": 20, "seconds": 600}'

keeps so many of each kind open at a time, opening a new one for each that the service has ended, and prints how many
of each it opened.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.chaos.crowd import request_body

POST = b"POST /v1/targets HTTP/1.1\r\nHost: teacher\r\nContent-Type: application/msgpack\r\n"
PING = b"GET /health/live HTTP/1.1\r\nHost: teacher\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2 = 1, 4, 5


class Held:
    """A connection whose other side decides when it ends."""

    def __init__(self, host: str, port: int, key: str, receive_buffer: int | None = None):
        self.key = key
        self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.setblocking(False)
        self._address = host, port

    async def connect(self) -> None:
        await asyncio.get_running_loop().sock_connect(self._socket, self._address)

    def close(self) -> None:
        self._socket.close()

    @property
    def ended(self) -> bool:
        """Whether the service has closed its side; asked of the kernel, so that it can be seen without reading."""
        state = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state not in (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2)

    async def send(self, data: bytes) -> None:
        """As much as is taken within a second."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def read(self) -> None:
        """What comes first."""
        await asyncio.get_running_loop().sock_recv(self._socket, 65_536)

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)


async def idle(held: Held) -> AsyncIterator[None]:
    yield


async def trickled_headers(held: Held) -> AsyncIterator[None]:
    await held.send(b"GET /health/live HTTP/1.1\r\nX-Slow: ")
    while True:
        await held.send(b"x")
        yield


async def empty_lines(held: Held) -> AsyncIterator[None]:
    while True:
        await held.send(b"\r\n")
        yield


async def body_after_the_refusal(held: Held) -> AsyncIterator[None]:
    """A byte of the body comes when the 401 is there, and then no more."""
    await held.send(POST + b"Content-Length: 1\r\n\r\n")
    await held.read()
    await held.send(b"x")
    yield


async def trickled_body(held: Held) -> AsyncIterator[None]:
    await held.send(POST + b"Content-Length: 100000\r\n\r\n")
    while True:
        await held.send(b"x")
        yield


async def trailers(held: Held) -> AsyncIterator[None]:
    await held.send(POST + CHUNKED + b"0\r\n")
    while True:
        await held.send(b"X-Trailer: " + b"x" * 60_000 + b"\r\n")
        yield


async def one_long_trailer(held: Held) -> AsyncIterator[None]:
    await held.send(POST + CHUNKED + b"0\r\nX-Trailer: ")
    while True:
        await held.send(b"x" * 60_000)
        yield


async def chunk_extensions(held: Held) -> AsyncIterator[None]:
    await held.send(POST + CHUNKED + b"1;")
    while True:
        await held.send(b"x" * 60_000)
        yield


async def half_closed(held: Held) -> AsyncIterator[None]:
    await held.send(b"GET /health/live HTTP/1.1\r\n")
    held.half_close()
    yield


async def half_closed_after_asking(held: Held) -> AsyncIterator[None]:
    await held.send(PING)
    held.half_close()
    yield


async def pipelined(held: Held) -> AsyncIterator[None]:
    """Thousands of requests in a packet, and no answer read."""
    while True:
        await held.send(b"GET / HTTP/1.1\r\n\r\n" * 10_000)
        yield


async def keeps_asking(held: Held) -> AsyncIterator[None]:
    while True:
        await held.send(PING)
        await held.read()
        yield


async def upgraded(held: Held) -> AsyncIterator[None]:
    await held.send(b"GET /health/live HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    while True:
        await held.send(b"x")
        yield


async def never_reads(held: Held) -> AsyncIterator[None]:
    """With a key: asks for ten megabytes, for the same each time, which the service has at hand."""
    body = request_body(1024, sequences=8, top_k=256, seed=7)
    authorization = f"Authorization: Bearer {held.key}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    await held.send(POST + authorization + body)
    yield


KEYLESS = [
    idle, trickled_headers, empty_lines, body_after_the_refusal, trickled_body, trailers, one_long_trailer,
    chunk_extensions, half_closed, half_closed_after_asking, pipelined, keeps_asking, upgraded,
]  # fmt: skip
Behaviour = Callable[[Held], AsyncIterator[None]]


async def hold(held: Held, behaviour: Behaviour, until: float, every_s: float = 0.5) -> float:
    """Seconds until the service ended it, which is looked at `every_s`; infinity if it had not by `until`."""
    began = time.monotonic()
    with suppress(ConnectionError, BrokenPipeError):
        await held.connect()
        steps = behaviour(held)
        going_on = True
        while not held.ended:
            if time.monotonic() > until:
                return float("inf")
            if going_on:
                going_on = await anext(steps, "over") != "over"
            await asyncio.sleep(every_s)
    return time.monotonic() - began


@dataclass(frozen=True)
class Flood:
    """`each` sockets of every kind at a time for `seconds`."""

    host: str
    port: int
    key: str
    each: int
    seconds: float

    async def run(self) -> Counter[str]:
        until = time.monotonic() + self.seconds
        opened: Counter[str] = Counter()

        async def keep(behaviour: Behaviour, number: int) -> None:
            await asyncio.sleep(number * 0.05)
            while time.monotonic() < until:
                held = Held(self.host, self.port, self.key, 4096 if behaviour is never_reads else None)
                opened[behaviour.__name__] += 1
                try:
                    await hold(held, behaviour, until, every_s=1.0)
                finally:
                    held.close()
                await asyncio.sleep(0.1)

        async with asyncio.TaskGroup() as group:
            for behaviour in (*KEYLESS, never_reads):
                for number in range(self.each if behaviour is not never_reads else min(self.each, 4)):
                    group.create_task(keep(behaviour, number))
        return opened


if __name__ == "__main__":
    print(json.dumps(asyncio.run(Flood(**json.loads(sys.argv[1])).run())))
