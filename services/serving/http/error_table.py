"""From errors to HTTP responses, for every route of every service. Installed by `install_error_table(app)`.

The status is that of the error's class (`teacher_proto.errors`); errors of framework and wire are translated here.
"""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from teacher_proto.errors import (
    MalformedError,
    MethodNotAllowedError,
    NotFoundError,
    StillhouseError,
    UnauthorizedError,
    WireError,
)

_COME_AGAIN = {429, 503}


def error_response(error: StillhouseError, request_id: str | None) -> Response:
    """The response for an error: its status, its JSON, and Retry-After if the client should retry."""
    headers = {}
    if error.status in _COME_AGAIN:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 1)))
    if isinstance(error, MethodNotAllowedError) and error.limit:
        headers["Allow"] = ", ".join(error.limit)
    body = {name: _plain(value) for name, value in error.to_json().items()} | {"request_id": request_id}
    response = Response(json.dumps(body), error.status, headers, "application/json")
    if isinstance(error, UnauthorizedError):
        # Basic makes a browser ask for the key on the HTML pages; browsers read one scheme per header.
        for scheme in ("Bearer", "Basic"):
            response.headers.append("WWW-Authenticate", f'{scheme} realm="stillhouse"')
    return response


def _plain(value: Any) -> Any:
    """NaN and infinity, which a request may contain, as text: JSON has neither."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def translate(error: Exception, request: Request) -> StillhouseError:
    """The StillhouseError for what wire, framework or route raised."""
    if isinstance(error, WireError):
        return MalformedError(error.message, field=error.field or "body")
    if isinstance(error, StillhouseError):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return MalformedError(f"{field}: {first['msg']}", field=field)
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = sorted(part.strip() for part in (error.headers or {}).get("Allow", "").split(",") if part)
        message = f"{_path(request)} does not support {request.method}; allowed: {', '.join(allowed)}"
        return MethodNotAllowedError(message, field="method", got=request.method, limit=allowed)
    if isinstance(error, HTTPException) and error.status_code == 404:
        return NotFoundError(f"there is no route {_path(request)}; /docs lists all routes", field="path")
    assert isinstance(error, HTTPException), error
    return MalformedError(str(error.detail))


def _path(request: Request) -> str:
    """The path as the router saw it; a Host header could alter that of `request.url`."""
    path = request.scope["path"]
    return repr(path if len(path) <= 80 else path[:77] + "...")


def install_error_table(app: FastAPI) -> None:
    """Answer every StillhouseError, and every error that the framework raises itself, as JSON."""

    async def answer(request: Request, error: Exception) -> Response:
        translated = translate(error, request)
        request.state.error = translated
        return error_response(translated, request.state.request_id)

    for kind in (StillhouseError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
