"""Runs a service out of its settings: logs, keys, certificate, listener, process. Called by each service's `run.py`."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
import uvloop
from starlette.types import ASGIApp

from serving.http.connections import Deadlines
from serving.http.keys import Keys
from serving.http.reload import Watched
from serving.http.server import bind
from serving.http.tls import TlsFiles
from serving.logs import done, set_up_logs
from serving.main import BEGAN
from serving.process import Process, leave_at_once
from serving.service import Service
from serving.settings import ServiceSettings

log = structlog.get_logger("stillhouse.run")
ServiceT = TypeVar("ServiceT", bound=Service[Any, Any, Any, Any])


def run_service(
    settings: ServiceSettings, make_service: Callable[[Keys], ServiceT], make_app: Callable[[ServiceT], ASGIApp]
) -> int:
    """Serve until a signal; the exit code. ValueError for what can't be served.

    `make_service` is called in the event loop, once keys are read and the port is taken.
    """
    set_up_logs(settings.log_format, settings.log_level)
    done("service imported", time.monotonic() - BEGAN)
    keys = Keys(settings.keys)
    tls = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    if not keys.required and not _is_loopback(settings.host):
        log.warning("no --keys: everybody who reaches this address may ask", host=settings.host)
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
        done("all that is needed to answer", time.monotonic() - BEGAN)
        print(f"{settings.program}: ready at {url}, {about}", flush=True)

    code = await process.run(make_app(service), listener, tls=context, watched=watched, on_ready=announce)
    if process.left_while_starting:
        leave_at_once(code)
    return code
