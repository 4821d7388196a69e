"""A TCP proxy with faults, between a client and a real service: what a network does to a connection, on cue.

with FaultyProxy(port, Fault("latency", 0.2)) as proxy:
    client_of(proxy.url)
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from dataclasses import dataclass
from typing import Literal

from student_trainer.targets.background import EventThread


@dataclass(frozen=True)
class Fault:
    """What goes wrong. `latency`: seconds each way. `bandwidth`: bytes a second, all connections together.

    `reset` (RST), `finish` (FIN) and `silence` (nothing more comes): every connection ends so after a random number of
    bytes, up to `amount`, of what the service answers.
    """

    kind: Literal["none", "latency", "bandwidth", "reset", "finish", "silence"]
    amount: float = 0.0


class FaultyProxy:
    """Listens on a free port and hands on to `port` of this machine. `hits` counts connections that were broken."""

    def __init__(self, port: int, fault: Fault, seed: int = 0):
        self.fault, self.hits = fault, 0
        self._target, self._draw = port, random.Random(seed)
        self._line = asyncio.Lock()
        self._thread = EventThread("proxy")
        self._server = self._thread.call(self._listen())
        self.port = int(self._server.sockets[0].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.call(self._stop())
        self._thread.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        breaks = self.fault.kind in ("reset", "finish", "silence")
        breaks_after = self._draw.randrange(int(self.fault.amount)) if breaks else None
        up = asyncio.create_task(self._pipe(reader, there_writer, None))
        down = asyncio.create_task(self._pipe(there_reader, writer, breaks_after))
        try:
            await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([down], timeout=None if up.done() and not down.done() else 0.5)
        finally:
            for task in (up, down):
                task.cancel()
            for each in (writer, there_writer):
                each.close()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, breaks_after: int | None) -> None:
        """Hand on what comes, late or slowly; with `breaks_after`, no more than so many bytes."""
        passed = 0
        loop = asyncio.get_running_loop()
        while chunk := await reader.read(16_384):
            if breaks_after is not None and passed + len(chunk) > breaks_after:
                writer.write(chunk[: breaks_after - passed])
                await self._break(writer)
                return
            passed += len(chunk)
            if self.fault.kind == "latency":
                # Later, and in order; what follows need not wait.
                loop.call_later(self.fault.amount, _write, writer, chunk)
                continue
            if self.fault.kind == "bandwidth":
                async with self._line:
                    await asyncio.sleep(len(chunk) / self.fault.amount)
            _write(writer, chunk)
        await asyncio.sleep(self.fault.amount if self.fault.kind == "latency" else 0)
        if not writer.is_closing() and writer.can_write_eof():
            writer.write_eof()

    async def _break(self, writer: asyncio.StreamWriter) -> None:
        self.hits += 1
        if self.fault.kind == "silence":
            await asyncio.Event().wait()
        if self.fault.kind == "reset":
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return
        writer.close()


def _write(writer: asyncio.StreamWriter, chunk: bytes) -> None:
    if not writer.is_closing():
        writer.write(chunk)
