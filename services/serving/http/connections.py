"""One HTTP connection and how long it may stay in each state: uvicorn's protocol plus deadlines and limits.

`server.py` makes one for each client and asks every half second which are `overdue`. That depends on a connection's
state, not on a history of events, so that no sequence of bytes escapes it. Clients without a key get tighter limits.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import socket
import struct
import termios
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from teacher_proto.errors import MalformedError

MAX_HEADER_BYTES = 32 * 1024
# Requests that arrived before the current one was answered; each takes some kilobytes of memory for as few as 18 bytes.
MAX_PIPELINED = 16
MAX_KEYLESS = 512
# Offset of tcpi_bytes_acked in Linux's `struct tcp_info`, since 4.1.
_BYTES_ACKED = 120
# Overhead allowed for each byte of a body: chunk sizes, their extensions, trailers. A chunk of one byte has 5.
_AROUND_BODY = 8


@dataclass(frozen=True)
class Deadlines:
    """In seconds. `stall_s`: for a client with a key that has stopped reading. Without a key: `keyless_idle_s` between
    requests, `keyless_life_s` in total, and `broken_s` for a client that has stopped reading. `broken_s` is also for
    clients with a key whose response was broken off."""

    header_s: float = 8.0
    linger_s: float = 2.0
    keep_alive_s: float = 75.0
    stall_s: float = 60.0
    keyless_idle_s: float = 8.0
    keyless_life_s: float = 20.0
    broken_s: float = 3.0


class Keyless:
    """The connections that have shown no key, oldest first. Above `limit`, the oldest without a request is closed."""

    def __init__(self, limit: int = MAX_KEYLESS):
        self._limit = limit
        self._connections: OrderedDict[Connection, None] = OrderedDict()

    def add(self, connection: Connection) -> None:
        self._connections[connection] = None
        if len(self._connections) > self._limit:
            oldest = next((one for one in self._connections if not one.answering), None)
            if oldest is not None:
                self.discard(oldest)
                oldest.end_at_once()

    def discard(self, connection: Connection) -> None:
        self._connections.pop(connection, None)


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self, config: Config, state: ServerState, app_state: dict[str, Any], deadlines: Deadlines, keyless: Keyless
    ):
        super().__init__(config, state, app_state)
        self._deadlines = deadlines
        self._keyless_ones = keyless
        self._keyed = False
        self._opened = self._since = self.loop.time()
        self._in_headers = True
        # Of the current message: bytes received, and how many of them are its body.
        self._came = self._body_came = 0
        # How much the client has read, and when that last increased.
        self._taken: tuple[int, float] | None = None

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def overdue(self, now: float) -> Literal["close", "reset"] | None:
        """What to do with this connection now: nothing, close it (what was written is still delivered), or reset it."""
        if not self.answering or self.transport.is_closing() or self.flow.write_paused:
            if self._stalls(now):
                return "reset"
            if self.transport.is_closing():
                return None
        else:
            self._taken = None
        if self.answering:
            return None  # `bodies.py` has a deadline for the body; the work has none
        limits, waited = self._deadlines, now - self._since
        if not self._keyed and now - self._opened > limits.keyless_life_s:
            return "close"
        if not self._in_headers:
            allowed = limits.linger_s
        elif self._came or self.cycle is None:
            allowed = limits.header_s
        else:
            allowed = limits.keep_alive_s if self._keyed else limits.keyless_idle_s
        return "close" if waited > allowed else None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._keyless_ones.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._keyless_ones.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_headers and not self._came:
            self._since = self.loop.time()
        self._came += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_headers and self._came > MAX_HEADER_BYTES:
            self.send_400_response(f"the headers are longer than {MAX_HEADER_BYTES} bytes")
        elif self._came > 2 * MAX_HEADER_BYTES + (1 + _AROUND_BODY) * self._body_came:
            self.send_400_response(
                f"got {self._came - self._body_came} bytes besides the {self._body_came} of the body: too many "
                "chunks or too long trailers"
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers are ignored: the request's headers have been acted on.
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.end_at_once()
            raise ValueError("too many requests before the first response")  # makes the parser stop

    def on_body(self, body: bytes) -> None:
        self._body_came += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_headers = True
        self._came = self._body_came = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        now = self._since = self.loop.time()
        if not self._keyed and self.cycle.scope["state"].get("client"):
            self._keyed = True
            self._keyless_ones.discard(self)
        if not self._keyed and now - self._opened > self._deadlines.keyless_life_s:
            self.transport.close()
        super().on_response_complete()
        # uvicorn's own timer restarts with each request, with or without a key.
        self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the format of our other errors; in the middle of a response, just disconnect."""
        if self.transport.is_closing():
            return
        if self.pipeline or (self.answering and self.cycle.response_started):
            self.end_at_once()
            return
        body = json.dumps(MalformedError(msg, field="request").to_json()).encode()
        head = STATUS_LINE[400] + b"content-type: application/json\r\nconnection: close\r\ncontent-length: "
        self.transport.write(head + str(len(body)).encode() + b"\r\n\r\n" + body)
        self.transport.close()

    def end_at_once(self) -> None:
        """Reset the connection: unread data is dropped, even by the kernel, which would else keep it for minutes."""
        if (number := _descriptor(self.transport)) is not None:
            borrowed = socket.socket(fileno=number)
            borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            borrowed.detach()
        self.transport.abort()

    def _stalls(self, now: float) -> bool:
        """Whether the client has read nothing for too long."""
        unsent = self.transport.get_write_buffer_size() + _in_kernel(self.transport)
        taken = _acknowledged(self.transport)
        if taken is None:
            taken = -unsent
        if not unsent or self._taken is None or taken > self._taken[0]:
            self._taken = taken, now
        broken = self.transport.is_closing() and self.answering
        keyed = self._keyed or (self.answering and bool(self.cycle.scope["state"].get("client")))
        patience = self._deadlines.stall_s if keyed and not broken else self._deadlines.broken_s
        return now - self._taken[1] > patience


def _in_kernel(transport: asyncio.Transport) -> int:
    """Bytes in the kernel that the peer has not acknowledged."""
    number = _descriptor(transport)
    return 0 if number is None else int(struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, b"\0" * 4))[0])


def _acknowledged(transport: asyncio.Transport) -> int | None:
    """Total bytes that the peer has acknowledged, whatever was written meanwhile; None if the kernel doesn't tell."""
    connected = transport.get_extra_info("socket")
    if connected is None or connected.fileno() < 0 or not hasattr(socket, "TCP_INFO"):
        return None
    told = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    return int(struct.unpack_from("Q", told, _BYTES_ACKED)[0]) if len(told) >= _BYTES_ACKED + 8 else None


def _descriptor(transport: asyncio.Transport) -> int | None:
    """The file descriptor of a transport's socket, None once that is closed."""
    connected = transport.get_extra_info("socket")
    number = -1 if connected is None else connected.fileno()
    return number if number >= 0 else None
