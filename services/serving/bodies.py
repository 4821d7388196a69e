"""Body limits that hold before a byte too many is buffered: size, encoding, speed, and the sum over all requests.

ASGI middleware that wraps `receive`: a route that reads no body is not held to it, and a request without a key is
refused before its body is looked at. Used by both services.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teacher_proto.errors import OverloadedError, SlowBodyError, TooLargeError, UnsupportedTypeError


@dataclass(frozen=True)
class BodyLimits:
    """`max_bytes` of a content type; a body must come within `timeout_s` plus its size over `min_rate` bytes/s.

    `max_total_bytes` is what all bodies may take together.
    """

    max_bytes: Callable[[str], int]
    timeout_s: float = 10.0
    min_rate: int = 65_536
    max_total_bytes: int = 256 * 2**20


class BodyGuard:
    """Raises TooLargeError, UnsupportedTypeError, SlowBodyError or OverloadedError out of `receive`."""

    def __init__(self, app: ASGIApp, limits: BodyLimits):
        self._app = app
        self._limits = limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _GuardedBody(self, scope, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._held -= body.received

    def hold(self, num_bytes: int) -> None:
        if self._held + num_bytes > self._limits.max_total_bytes:
            raise OverloadedError(
                f"the bodies being read take {self._held} bytes, of {self._limits.max_total_bytes} for all together",
                field="body", got=self._held + num_bytes, limit=self._limits.max_total_bytes, retry_after=1.0,
            )  # fmt: skip
        self._held += num_bytes


class _GuardedBody:
    def __init__(self, guard: BodyGuard, scope: Scope, receive: Receive):
        self._guard = guard
        self._limits = guard._limits
        self._receive = receive
        self._headers = dict(scope["headers"])
        content_type = self._headers.get(b"content-type", b"").decode("latin-1")
        self._max_bytes = self._limits.max_bytes(content_type)
        self._started_at: float | None = None
        self._complete = False
        self.received = 0

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
                f"{self.received} bytes of the body came within {allowed_s:.1f} s, and not its end",
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
                f"Content-Encoding {encoding!r}: bodies are not compressed here", field="Content-Encoding",
                got=encoding, limit="identity",
            )  # fmt: skip
        declared = self._headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            self._refuse(int(declared))

    def _count(self, num_bytes: int) -> None:
        if self.received + num_bytes > self._max_bytes:
            self._refuse(self.received + num_bytes)
        self._guard.hold(num_bytes)
        self.received += num_bytes

    def _refuse(self, got: int) -> None:
        raise TooLargeError(
            f"a body of {got} bytes or more, of at most {self._max_bytes}: ask for fewer sequences a request",
            field="body", got=got, limit=self._max_bytes,
        )  # fmt: skip
