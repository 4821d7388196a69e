"""A response whose work stops when its client disconnects. Returned by routes that do work before or while responding.

Neither uvicorn nor FastAPI cancels a handler when the connection closes: here the work races `http.disconnect`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# A message is sent in pieces, so that no more than one is in the connection's buffer.
_PIECE_BYTES = 2**18


class Outlet:
    """Where the work writes: `start` once, `write` any number of times. Writing waits for a slow client; one that stops
    reading is disconnected (`connections.py`), which ends the work."""

    def __init__(self, send: Send):
        self._send = send
        self._written_at = time.monotonic()
        self.started = False
        self.client_left = False

    @property
    def silent_s(self) -> float:
        """Seconds since the last write, or since the work began."""
        return time.monotonic() - self._written_at

    async def start(self, media_type: str, status: int = 200, more: Mapping[str, str] | None = None) -> None:
        """Send the status and headers; `more` are headers besides the two that every response has."""
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
        headers += [(name.lower().encode(), value.encode()) for name, value in (more or {}).items()]
        await self._put({"type": "http.response.start", "status": status, "headers": headers})
        self.started = True

    async def write(self, data: bytes, *, last: bool = False) -> None:
        pieces = memoryview(data)
        while len(pieces) > _PIECE_BYTES:
            await self._put({"type": "http.response.body", "body": pieces[:_PIECE_BYTES], "more_body": True})
            pieces = pieces[_PIECE_BYTES:]
        await self._put({"type": "http.response.body", "body": pieces, "more_body": not last})

    async def _put(self, message: dict) -> None:
        await self._send(message)
        if self.client_left:  # then `send` has silently dropped the message
            raise ClientDisconnect("the client disconnected before its response was complete")
        self._written_at = time.monotonic()


Work = Callable[[Outlet], Awaitable[None]]


class RacedResponse(Response):
    """Runs `work(outlet)`; cancels it when the client leaves. Errors before `outlet.start` become error responses."""

    def __init__(self, work: Work):
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outlet = Outlet(send)
        work = asyncio.ensure_future(self._work(outlet))
        gone = asyncio.create_task(_disconnected(receive, outlet))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect("the client disconnected before its response was complete")
            await work
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            # Await both, so that permits are returned and nothing is computed in vain once this returns.
            await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(receive: Receive, outlet: Outlet) -> None:
    while not outlet.client_left:
        outlet.client_left = (await receive())["type"] == "http.disconnect"
