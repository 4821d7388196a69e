"""uvicorn with what it lacks: deadlines for headers and idle sockets, errors as JSON, and a stop that we decide on.

Used by `process.py`. Requests of clients that trickle are closed; a socket that says nothing is closed; what follows
a refused body is read for a moment, so that the refusal arrives, and then the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from teacher_proto.errors import MalformedError

HEADER_TIMEOUT_S = 8.0
MAX_HEADER_BYTES = 32 * 1024
LINGER_S = 2.0
KEEP_ALIVE_S = 75
_HANDSHAKE_TIMEOUT_S = 8.0


class GuardedProtocol(HttpToolsProtocol):
    """One connection. A timer runs whenever a request's headers are awaited, or a refused body is still coming."""

    _timer: asyncio.TimerHandle | None = None
    _in_headers = True
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(HEADER_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
            if self._timer is None:
                self._arm(HEADER_TIMEOUT_S)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the headers are longer than {MAX_HEADER_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_bytes = 0
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_headers = True
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_headers and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._arm(LINGER_S)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP, answered as our other errors are; in the midst of an answer only the end is left to say."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = json.dumps(MalformedError(msg, field="request").to_json()).encode()
        head = STATUS_LINE[400] + b"content-type: application/json\r\nconnection: close\r\ncontent-length: "
        self.transport.write(head + str(len(body)).encode() + b"\r\n\r\n" + body)
        self.transport.close()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._close)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Listens on one bound socket; signals are `process.py`'s business."""

    def __init__(self, app: ASGIApp, listener: socket.socket, tls: ssl.SSLContext | None = None):
        super().__init__(uvicorn.Config(
            app, http=GuardedProtocol, ws="none", lifespan="off", loop="none", access_log=False, log_config=None,
            server_header=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=1,
        ))  # fmt: skip
        self._listener = listener
        self._tls = tls

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()

        def create_protocol() -> asyncio.Protocol:
            return GuardedProtocol(self.config, self.server_state, self.lifespan.state)

        options: dict[str, Any] = {}
        if self._tls is not None:
            options = {"ssl": self._tls, "ssl_handshake_timeout": _HANDSHAKE_TIMEOUT_S}
        loop = asyncio.get_running_loop()
        self.servers = [await loop.create_server(create_protocol, sock=self._listener, backlog=2048, **options)]
        self.started = True


def bind(host: str, port: int) -> socket.socket:
    """A listening address, taken before the model loads. ValueError if it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"can't listen on {host}:{port}: {error.strerror}; choose another with --port") from None
    listener.setblocking(False)
    return listener
