"""Request bodies: limits, in total and per client (413, 429, 503), enforced before the excess is buffered, and parsing.

The limits (size, encoding, speed, the total of all requests and of each client) are ASGI middleware that wraps
`receive`: they do not apply to a route that reads no body, and a request without a key is refused before its body is
read. Routes read with `read_request`, or with `read_json` for another server's format. Every error names the field at
fault.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.engine import AnyEngine
from teacher_proto.errors import (
    OverloadedError,
    QuotaError,
    SlowBodyError,
    TooLargeError,
    UnsupportedTypeError,
    WrongTeacherError,
)
from teacher_proto.identity import compare_fingerprints
from teacher_proto.request_checks import RequestT, SequenceLimits, parse_body
from teacher_proto.wire import records as wire
from teacher_proto.wire.as_json import decode_json_request


@dataclass(frozen=True)
class BodyLimits:
    """`max_bytes` by content type; a body must arrive within `timeout_s` plus its size divided by `min_rate` bytes/s.

    `max_total_bytes` bounds all bodies together. With `shared`, each client may hold a share of it: with n clients that
    hold any, one part in n + 1.
    """

    max_bytes: Callable[[str], int]
    timeout_s: float = 10.0
    min_rate: int = 65_536
    max_total_bytes: int = 256 * 2**20
    shared: bool = False


class BodyGuard:
    """Raises TooLargeError, UnsupportedTypeError, SlowBodyError, QuotaError or OverloadedError from `receive`.

    A request reserves its declared length at its first byte, so that of many large bodies some arrive whole.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits):
        self._app = app
        self._limits = limits
        self._held: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _GuardedBody(self, scope, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.give_back(body)

    def hold(self, client: str, num_bytes: int) -> None:
        held, most = self._held.total(), self._limits.max_total_bytes
        if held + num_bytes > most:
            raise OverloadedError(
                f"no room for the body: the bodies of all requests take {held} of at most {most} bytes", field="body",
                got=held + num_bytes, limit=most, retry_after=1.0,
            )  # fmt: skip
        own = self._held[client]
        share = most // (len(self._held.keys() | {client}) + 1)
        if self._limits.shared and own and own + num_bytes > share:
            raise QuotaError(
                f"the bodies of {client!r} take {own} bytes and this needs {num_bytes} more, but its share is {share}: "
                "retry when one of its requests has finished", field="body", got=own + num_bytes, limit=share,
                retry_after=1.0,
            )  # fmt: skip
        self._held[client] += num_bytes

    def give_back(self, body: _GuardedBody) -> None:
        self._held[body.client] -= body.held
        if not self._held[body.client]:
            del self._held[body.client]


class _GuardedBody:
    def __init__(self, guard: BodyGuard, scope: Scope, receive: Receive):
        self._guard = guard
        self._limits = guard._limits
        self._receive = receive
        self._scope = scope
        self._headers = dict(scope["headers"])
        content_type = self._headers.get(b"content-type", b"").decode("latin-1")
        self._max_bytes = self._limits.max_bytes(content_type)
        self._started_at: float | None = None
        self._complete = False
        self.received = self.held = 0
        self.client = ""

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        if self._started_at is None:
            self._started_at = now
            self._check_headers()
        allowed_s = self._limits.timeout_s + self.received / self._limits.min_rate
        try:
            async with asyncio.timeout_at(self._started_at + allowed_s):
                message = await self._receive()
        except TimeoutError:
            raise SlowBodyError(
                f"the body is incomplete after {allowed_s:.1f} s: got {self.received} bytes",
                field="body", got=self.received, limit=allowed_s,
            ) from None  # fmt: skip
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            self._complete = not message.get("more_body", False)
        return message

    def _check_headers(self) -> None:
        encoding = self._headers.get(b"content-encoding", b"identity").decode("latin-1")
        if encoding.strip().lower() != "identity":
            raise UnsupportedTypeError(
                f"Content-Encoding {encoding!r} is not supported: send the body uncompressed", field="Content-Encoding",
                got=encoding, limit="identity",
            )  # fmt: skip
        declared = self._headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            self._refuse(int(declared))
        self._hold(int(declared) if declared.isdigit() else 0)

    def _count(self, num_bytes: int) -> None:
        if self.received + num_bytes > self._max_bytes:
            self._refuse(self.received + num_bytes)
        self.received += num_bytes
        self._hold(max(0, self.received - self.held))

    def _hold(self, num_bytes: int) -> None:
        if num_bytes:
            # Set by the route's key check, which precedes reading the body.
            self.client = self.client or self._scope.get("state", {}).get("client", "")
            self._guard.hold(self.client, num_bytes)
            self.held += num_bytes

    def _refuse(self, got: int) -> None:
        raise TooLargeError(
            f"got a body of {got} bytes or more, expected at most {self._max_bytes}: send fewer sequences per request",
            field="body", got=got, limit=self._max_bytes,
        )  # fmt: skip


async def read_json(request: Request, limits: SequenceLimits) -> dict[str, Any]:
    """The decoded fields of a JSON body."""
    _media_type(request, wire.JSON)
    return decode_json_request(await request.body(), limits)


async def read_request(
    request: Request, kind: type[RequestT], engine: AnyEngine, check: Callable[[RequestT], None]
) -> tuple[RequestT, bool]:
    """The request in a msgpack or JSON body, after `check` has passed it, and whether the response is to be JSON.
    WireError if the bytes don't decode, WrongTeacherError if the request is for a teacher with other weights. A
    difference in the numeric half of the fingerprint is for the client to judge: it is in the response's header."""
    content_type = _media_type(request, wire.MSGPACK, wire.JSON)
    body, limits = await request.body(), engine.limits
    packed = content_type == wire.MSGPACK
    fields = wire.decode_request(body, limits, kind) if packed else decode_json_request(body, limits)
    asked = parse_body(kind, fields)
    check(asked)
    wanted, ours = asked.fingerprint, engine.identity.fingerprint
    if wanted is not None and compare_fingerprints(wanted, ours) == "semantic":
        raise WrongTeacherError(
            f"the request is for teacher {wanted[:80]!r}, but this is {ours}: GET /v1/teacher returns its identity",
            field="fingerprint", got=wanted[:80], limit=ours,
        )  # fmt: skip
    return asked, _wants_json(request.headers.get("accept", ""), content_type)


def _media_type(request: Request, *spoken: str) -> str:
    """The content type of the body, which must be one of `spoken`. UnsupportedTypeError otherwise."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind not in spoken:
        raise UnsupportedTypeError(
            f"Content-Type {given[:80]!r} is not supported: send {' or '.join(spoken)}", field="Content-Type",
            got=given[:80], limit=list(spoken),
        )  # fmt: skip
    return kind


def _wants_json(accept: str, content_type: str) -> bool:
    """The Accept header decides if it names one of the two; otherwise the response has the format of the request."""
    named = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for kind in named:
        if kind in (wire.MSGPACK, wire.JSON):
            return kind == wire.JSON
    return content_type == wire.JSON
