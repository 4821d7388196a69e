"""The outermost middleware of a service: request ids, a log line and metrics per request, JSON for unexpected errors.

Pure ASGI, so that nothing is buffered and cancellation propagates. Added by `make_app` in `routes.py`.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.error_table import error_response
from teacher_proto.errors import EngineError, StillhouseError

log = structlog.get_logger("stillhouse.http")
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass
class Exchange:
    """What is known of a request when it is over. `reason` is an error's code, `disconnect`, `internal` or empty."""

    method: str
    request_id: str
    route: str = "unmatched"
    client: str = ""
    status: int = 0
    reason: str = ""
    seconds: float = 0.0
    bytes_out: int = 0


class RequestContext:
    """ASGI middleware. `state.request_id` is the client's X-Request-Id if that is safe to log, else a new one."""

    def __init__(self, app: ASGIApp, observe: Callable[[Exchange], None]):
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope["method"], request_id_of(scope))
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        structlog.contextvars.bind_contextvars(request_id=exchange.request_id)
        started = time.monotonic()
        try:
            await self._serve(exchange, scope, receive, send)
        finally:
            exchange.seconds = time.monotonic() - started
            self._finish(exchange, scope)
            structlog.contextvars.unbind_contextvars("request_id")

    async def _serve(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.request_id
            await send(message)
            exchange.bytes_out += len(message.get("body", b""))

        try:
            await self._app(scope, receive, send_noted)
        except ClientDisconnect:
            exchange.reason = "disconnect"
        except Exception as error:
            log.exception("unforeseen error", error=str(error))
            exchange.reason = "internal"
            if exchange.status:
                # Part of the response is out: only a broken connection tells the client that the rest won't come.
                raise
            unforeseen = StillhouseError(
                "internal error: find the reason in the service's log, under this request id", retryable=False
            )
            await error_response(unforeseen, exchange.request_id)(scope, receive, send_noted)

    def _finish(self, exchange: Exchange, scope: Scope) -> None:
        exchange.route = getattr(scope.get("route"), "path", "unmatched")
        exchange.client = scope["state"].get("client", "")
        error = scope["state"].get("error")
        if error is not None:
            exchange.reason = exchange.reason or error.code
        self._observe(exchange)
        level = log.error if exchange.status >= 500 and isinstance(error, (EngineError, type(None))) else log.info
        level(
            "request", method=exchange.method, route=exchange.route, status=exchange.status, client=exchange.client,
            reason=exchange.reason, seconds=round(exchange.seconds, 6), bytes_out=exchange.bytes_out,
        )  # fmt: skip


def request_id_of(scope: Scope) -> str:
    """The client's request id if it is safe to log, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _ACCEPTED_ID.fullmatch(text):
                return text
    return uuid.uuid4().hex
