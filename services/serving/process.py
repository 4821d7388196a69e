"""The life of a service process: from its settings to a listener, then start, serve, drain, stop. Called by each
service's `run`.

SIGTERM or SIGINT drains: new requests get 503, accepted ones are finished, then the process exits with 0. A second
signal, or the end of the drain time, aborts: the remaining requests get 503 and the process exits with 1. If the engine
dies, it exits with 70.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import structlog
import uvloop
from starlette.types import ASGIApp

from serving.http.connections import Deadlines
from serving.http.keys import Keys
from serving.http.reload import TlsFiles, Watched, keep_loaded
from serving.http.server import Server, bind
from serving.logs import done, set_up_logs
from serving.main import BEGAN
from serving.service import Service
from serving.settings import ServiceSettings
from teacher_proto.errors import EngineDeadError, OverloadedError, StillhouseError

log = structlog.get_logger("stillhouse.process")
ServiceT = TypeVar("ServiceT", bound=Service[Any, Any, Any, Any])
EXIT_OK, EXIT_ABORTED, EXIT_ENGINE_DIED = 0, 1, 70
_CHECK_EVERY_S = 1.0
_FLUSH_S = 1.0


def run_service(
    settings: ServiceSettings, make_service: Callable[[Keys], ServiceT], make_app: Callable[[ServiceT], ASGIApp]
) -> int:
    """Serve until a signal; returns the exit code. ValueError for what can't be served.

    `make_service` is called in the event loop, once the keys are read and the port is bound.
    """
    set_up_logs(settings.log_format, settings.log_level)
    done("service imported", time.monotonic() - BEGAN)
    keys = Keys(settings.keys)
    tls = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    if not keys.required and not _is_loopback(settings.host):
        log.warning("no --keys: anybody who can reach this address can send requests", host=settings.host)
    with bind(settings.host, settings.port) as listener:
        return uvloop.run(_serve(settings, keys, tls, listener, make_service, make_app))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(
    settings: ServiceSettings, keys: Keys, tls: TlsFiles | None, listener: socket.socket,
    make_service: Callable[[Keys], ServiceT], make_app: Callable[[ServiceT], ASGIApp],
) -> int:  # fmt: skip
    service = make_service(keys)
    process = Process(service, settings.drain_time, Deadlines(stall_s=settings.stall_timeout))
    service.on_death = process.died
    context, watched = None, []
    if keys.path is not None:
        watched.append(Watched("keys", [keys.path], keys.reload))
    if tls is not None:
        context = tls.context()
        watched.append(Watched("certificate", tls.paths, lambda: tls.load_into(context)))

    def announce() -> None:
        identity = service.engine.identity
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"{'http' if tls is None else 'https'}://{host}:{listener.getsockname()[1]}"
        about = f"{identity.semantic.model}, {identity.fingerprint} in {identity.semantic.dtype}"
        done("everything needed to serve requests", time.monotonic() - BEGAN)
        print(f"{settings.program}: ready at {url}, {about}", flush=True)

    code = await process.run(make_app(service), listener, tls=context, watched=watched, on_ready=announce)
    if process.left_while_starting:
        leave_at_once(code)
    return code


class Process:
    """Runs one service behind one listener until a signal arrives or the engine dies."""

    def __init__(self, service: Service[Any, Any, Any, Any], drain_s: float, deadlines: Deadlines):
        self._service = service
        self._deadlines = deadlines
        self._drain_s = drain_s
        self._signals = 0
        self._signalled = asyncio.Event()
        self._signalled_again = asyncio.Event()
        self._death: EngineDeadError | None = None
        self._died = asyncio.Event()
        self._left_while_starting = False

    async def run(
        self, app: ASGIApp, listener: socket.socket, *, tls: ssl.SSLContext | None = None,
        watched: Sequence[Watched] = (), on_ready: Callable[[], None],
    ) -> int:  # fmt: skip
        """Returns the exit code. A ValueError of the service's start, for what it can't serve, propagates."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        self._server = server = Server(app, listener, tls, self._deadlines)
        serving = asyncio.create_task(server.serve())
        watching = asyncio.create_task(keep_loaded(watched))
        try:
            if not await self._start(on_ready):
                return EXIT_ABORTED
            return await self._serve()
        finally:
            watching.cancel()
            server.should_exit = True
            await serving
            if not self._left_while_starting:
                await self._service.close()

    @property
    def left_while_starting(self) -> bool:
        """Whether a signal came before the service was ready: a thread may still be loading a model."""
        return self._left_while_starting

    def died(self, error: EngineDeadError) -> None:
        """Called by whoever notices that the engine died; the first reason is the one reported."""
        if self._death is None:
            self._death = error
            self._died.set()

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        log.warning("signal", name=signal.Signals(number).name, count=self._signals)
        (self._signalled if self._signals == 1 else self._signalled_again).set()

    async def _start(self, on_ready: Callable[[], None]) -> bool:
        start = asyncio.create_task(self._service.start())
        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait({start, signalled}, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if not start.done():
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            self._left_while_starting = True
            log.warning("stopped before it was ready")
            return False
        await start
        # Everything loaded so far stays. A full collection would traverse it, which takes 0.4 s with vLLM's modules and
        # blocks the event loop.
        gc.collect()
        gc.freeze()
        on_ready()
        return True

    async def _serve(self) -> int:
        watch = asyncio.create_task(self._watch())
        try:
            await self._first(self._signalled, self._died)
            if self._death is None:
                return await self._drain()
        finally:
            watch.cancel()
        return await self._end_dead()

    async def _drain(self) -> int:
        self._service.drain(
            "the service is draining: it exits when the requests in progress have finished; use another replica"
        )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._drain_s
        drained = asyncio.create_task(self._service.drained())
        again = asyncio.create_task(self._first(self._signalled_again, self._died))
        await asyncio.wait({drained, again}, timeout=self._drain_s, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if drained.done():
            # The last responses may still be in socket buffers: clients get the rest of the time to read them.
            self._server.config.timeout_graceful_shutdown = max(1, int(deadline - loop.time()))
            log.info("drained")
            return EXIT_OK
        drained.cancel()
        if self._death is not None:
            return await self._end_dead()
        why = "received a second signal" if self._signals > 1 else f"the drain time of {self._drain_s:g} s is over"
        log.warning("aborted", why=why)
        await self._abort(OverloadedError(f"the service is stopping: {why}; use another replica", retry_after=5.0))
        return EXIT_ABORTED

    async def _end_dead(self) -> int:
        assert self._death is not None
        log.error("engine died", reason=self._death.message)
        print(f"stillhouse: the engine died: {self._death.message}", file=sys.stderr, flush=True)
        self._service.drain(f"the engine died: {self._death.message}")
        await self._abort(self._death)
        return EXIT_ENGINE_DIED

    async def _abort(self, error: StillhouseError) -> None:
        self._service.abort(error)
        try:
            await asyncio.wait_for(self._service.drained(), _FLUSH_S)
        except TimeoutError:
            log.warning("clients did not read their error responses in time")

    async def _watch(self) -> None:
        while True:
            try:
                await self._service.check()
            except EngineDeadError as error:
                self.died(error)
                return
            await asyncio.sleep(_CHECK_EVERY_S)

    @staticmethod
    async def _first(*events: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def leave_at_once(code: int) -> NoReturn:
    """End the process without waiting for its threads: one that is loading a model can't be stopped, and the
    interpreter would wait minutes for it. Child processes, which a normal exit would end, are killed first."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
