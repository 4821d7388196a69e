"""A client that asks to be told of its request's progress, for the chaos tests: all that it heard, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import httpx

from teacher_proto.wire.records import MSGPACK, TARGETS_FORMAT
from teacher_proto.wire.responses import End, Failure, Progress, ResponseDecoder, Targets


@dataclass
class Heard:
    """One answer as it came. Times in seconds since the request was sent; `bytes_of_progress` is what those messages
    took of the connection, the frames around them included."""

    status: int = 0
    refusal: str = ""
    progress: list[tuple[float, Progress]] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    failures: list[tuple[int | None, str]] = field(default_factory=list)
    bytes_of_progress: int = 0
    whole: bool = False
    seconds: float = 0.0

    def estimates(self) -> list[tuple[float, float]]:
        """(when, seconds that it would still take) of every progress message that says enough."""
        return [
            (at, (p.tokens - p.tokens_done + p.tokens_ahead) / p.tokens_per_second)
            for at, p in self.progress if p.tokens_per_second
        ]  # fmt: skip


async def listen(
    client: httpx.AsyncClient, body: bytes, *, key: str | None = None, every_s: float = 1.0, path: str = "/v1/targets"
) -> Heard:
    """Post a request and hear its answer out."""
    headers = {"Content-Type": MSGPACK, "X-Progress": str(every_s)} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    heard, started, decoder = Heard(), time.monotonic(), ResponseDecoder(TARGETS_FORMAT)
    async with client.stream("POST", path, content=body, headers=headers) as response:
        heard.status = response.status_code
        if response.status_code != 200:
            heard.refusal = (await response.aread()).decode()
            heard.seconds = time.monotonic() - started
            return heard
        async for chunk in response.aiter_bytes():
            for message in decoder.feed(chunk):
                if isinstance(message, Progress):
                    heard.progress.append((time.monotonic() - started, message))
                    heard.bytes_of_progress += len(chunk) + 6
                elif isinstance(message, Targets):
                    heard.answered.append(message.index)
                elif isinstance(message, Failure):
                    heard.failures.append((message.index, message.error.code))
                heard.whole = heard.whole or isinstance(message, End)
    heard.seconds = time.monotonic() - started
    return heard
