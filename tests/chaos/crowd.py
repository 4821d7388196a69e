"""Many clients of one teacher process at once, for the chaos tests: what each request came to, and how long it took.

    python -m tests.chaos.crowd '{"url": ..., "clients": 36, "seconds": 8, ...}'

is a crowd in a process of its own, so that its work does not count as the teacher's delay; `crowd_process` runs it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace

import httpx
import numpy as np

from teacher_proto.errors import WireError
from teacher_proto.requests import TargetsRequest
from teacher_proto.wire.records import MSGPACK, TARGETS_FORMAT, encode_request
from teacher_proto.wire.responses import End, Failure, ResponseDecoder, Targets


@dataclass
class Outcome:
    """One request. `status` 0: no response at all. `whole`: the body decoded to its end message."""

    status: int = 0
    whole: bool = False
    targets: int = 0
    failures: list[str] = field(default_factory=list)
    retry_after: float | None = None
    body: bytes = b""
    seconds: float = 0.0
    started: float = 0.0
    error: str = ""


def request_body(tokens: int, *, sequences: int = 1, seed: int = 0, first: int = 1, **fields: object) -> bytes:
    """A request of random ids from 1 to 511 that begin with `first`; the same seed makes the same request."""
    generator = np.random.default_rng(seed)
    ids = [np.concatenate([[first], generator.integers(1, 512, tokens - 1)]) for _ in range(sequences)]
    return encode_request(TargetsRequest.model_validate({"sequences": ids, "top_k": 8} | fields))


async def ask(client: httpx.AsyncClient, body: bytes, key: str | None = None) -> Outcome:
    """Post one request and read its answer to the end, whatever comes."""
    headers = {"Content-Type": MSGPACK} | ({"Authorization": f"Bearer {key}"} if key else {})
    outcome = Outcome(started=time.monotonic())
    try:
        async with client.stream("POST", "/v1/targets", content=body, headers=headers) as response:
            outcome.status = response.status_code
            if "retry-after" in response.headers:
                outcome.retry_after = float(response.headers["retry-after"])
            if response.status_code != 200:
                outcome.body = await response.aread()
            else:
                await _decode(response, outcome)
    except (httpx.TransportError, WireError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - outcome.started
    return outcome


async def _decode(response: httpx.Response, outcome: Outcome) -> None:
    decoder = ResponseDecoder(TARGETS_FORMAT)
    async for chunk in response.aiter_bytes():
        for message in decoder.feed(chunk):
            if isinstance(message, Targets):
                outcome.targets += 1
            elif isinstance(message, Failure):
                outcome.failures.append(message.error.code)
            outcome.whole = outcome.whole or isinstance(message, End)
    decoder.close()


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    """A value without labels out of `/metrics`."""
    text = (await client.get("/metrics")).text
    (line,) = [line for line in text.splitlines() if line.startswith(f"stillhouse_{name} ")]
    return float(line.split()[1])


async def until_gauge(client: httpx.AsyncClient, name: str, reached: Callable[[float], bool]) -> None:
    """Return once the gauge is where it should be, however slow the machine."""
    async with asyncio.timeout(30):
        while not reached(await gauge(client, name)):  # noqa: ASYNC110 - another process is polled
            await asyncio.sleep(0.01)


async def until_admitted(client: httpx.AsyncClient, requests: int) -> None:
    """Return once so many requests are in flight."""
    await until_gauge(client, "admitted_requests", lambda value: value >= requests)


@asynccontextmanager
async def lag_of(client: httpx.AsyncClient) -> AsyncIterator[list[float]]:
    """Seconds that a service took to say that it lives, asked over and over while the block runs."""
    seconds: list[float] = []

    async def ask_on() -> None:
        while True:
            started = time.monotonic()
            assert (await client.get("/health/live")).status_code == 200
            seconds.append(time.monotonic() - started)
            await asyncio.sleep(0.002)

    asking = asyncio.create_task(ask_on())
    try:
        yield seconds
    finally:
        asking.cancel()


async def crowd(
    url: str, clients: int, make_body: Callable[[int], bytes], until: Callable[[], bool], key: str | None = None,
    pause_s: float = 0.0, asks_every_s: float = 0.0,
) -> list[Outcome]:  # fmt: skip
    """`clients` tasks that ask one request after another until `until()`; every outcome, in no order."""
    outcomes: list[Outcome] = []
    numbers = iter(range(10**9))

    async def one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60, verify=False) as client:
            while not until():
                outcome = await ask(client, make_body(next(numbers)), key)
                outcomes.append(outcome)
                if outcome.status != 200:
                    await asyncio.sleep(max(pause_s, 0.01))
                elif asks_every_s:
                    await asyncio.sleep(asks_every_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
    return outcomes


@dataclass(frozen=True)
class Crowd:
    """`clients` that ask for `tokens` tokens a request until `seconds` have passed; no two requests are alike."""

    url: str
    clients: int
    seconds: float
    key: str
    seed: int
    tokens: int = 50
    pause_s: float = 0.0
    asks_every_s: float = 0.0

    async def run(self) -> list[Outcome]:
        end = time.monotonic() + self.seconds
        return await crowd(
            self.url, self.clients, lambda n: request_body(self.tokens, seed=self.seed * 10**7 + n),
            lambda: time.monotonic() > end, self.key, self.pause_s,
            self.asks_every_s,
        )  # fmt: skip


async def crowd_process(them: Crowd) -> list[Outcome]:
    """The outcomes of a crowd in a process of its own, without bodies."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.crowd", json.dumps(asdict(them)), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return [Outcome(**fields) for fields in json.loads(out)]


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share * 100)) if values else float("nan")


if __name__ == "__main__":
    found = asyncio.run(Crowd(**json.loads(sys.argv[1])).run())
    print(json.dumps([asdict(replace(outcome, body="")) for outcome in found]))
