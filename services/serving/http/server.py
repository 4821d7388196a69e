"""uvicorn on one listener, with deadlines for connections and a shutdown under our control. Used by `process.py`."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from serving.http.connections import Connection, Deadlines, Keyless

_HANDSHAKE_TIMEOUT_S = 8.0
_TLS_END_TIMEOUT_S = 10.0
_LOOK_EVERY_TICKS = 5  # of 0.1 s
_MOST_DESCRIPTORS = 65_536


class Server(uvicorn.Server):
    """Listens on one bound socket; `process.py` handles signals."""

    def __init__(
        self, app: ASGIApp, listener: socket.socket, tls: ssl.SSLContext | None, deadlines: Deadlines,
    ):  # fmt: skip
        super().__init__(uvicorn.Config(
            app, http=Connection, ws="none", lifespan="off", loop="none", access_log=False, log_config=None,
            server_header=False, timeout_graceful_shutdown=1,
        ))  # fmt: skip
        self._listener = listener
        self._tls = tls
        self._deadlines = deadlines
        self._keyless = Keyless()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        _raise_descriptor_limit()

        def create_protocol() -> asyncio.Protocol:
            state = self.lifespan.state
            return Connection(self.config, self.server_state, state, self._deadlines, self._keyless)

        options: dict[str, Any] = {}
        if self._tls is not None:
            options = {
                "ssl": self._tls, "ssl_handshake_timeout": _HANDSHAKE_TIMEOUT_S,
                "ssl_shutdown_timeout": _TLS_END_TIMEOUT_S,
            }  # fmt: skip
        loop = asyncio.get_running_loop()
        self.servers = [await loop.create_server(create_protocol, sock=self._listener, backlog=2048, **options)]
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        if counter % _LOOK_EVERY_TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                verdict = connection.overdue(now)
                if verdict == "reset":
                    connection.end_at_once()
                elif verdict == "close":
                    connection.transport.close()
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Bind the address before the model loads. ValueError if that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Detects peers that vanished while nothing is being sent to them; accepted connections inherit the option.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"can't listen on {host}:{port}: {error.strerror}; choose another with --port") from None
    listener.setblocking(False)
    return listener


def _raise_descriptor_limit() -> None:
    """Many systems start a process with 1024 descriptors but allow more; a flood of connections would use them up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
