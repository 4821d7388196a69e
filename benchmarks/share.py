"""Cost of four students on one teacher, and the share that each gets: real HTTP, real vLLM, `TeacherClient`s with keys.

    make bench-share                                     another teacher: --model; --engine hf for plain transformers

*Same data*: four students read the same batches, each at its own pace; forward passes are the tokens computed by the
engine divided by the tokens of the data. *Different data*: four students request as much as they can for some seconds,
one of them over 64 connections; only responses completed in the second half count. Each student keeps more in flight
than its share of the engine's window, because one that requests less leaves its turns to the others. *Two epochs*: one
student reads the data twice with a target store, with a restart in between.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np

from benchmarks.report import report
from benchmarks.servers import ROOT, child, until_healthy
from teacher_proto.client.expectation import LENGTHS
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.requests import TargetsRequest
from tests.teacher_process import free_port

STUDENTS = ("ada", "bo", "cy", "flood")
KEYS = {name: f"{name}-key-0123456789abcdef" for name in STUDENTS}
CONNECTIONS = {"ada": 8, "bo": 8, "cy": 8, "flood": 64}
TOP_K = 64
MOST_PASSES, SHARE, WITHIN = 1.1, 0.25, 0.03
# Tokens that the engine computes for every client that connects, whatever the store holds.
CANARY_TOKENS = sum(LENGTHS)


def batches(count: int, sequences: int, length: int, seed: int = 0) -> list[TargetsRequest]:
    """Requests of random token ids; ids below 256 are in every vocabulary."""
    generator = np.random.default_rng(seed)
    return [
        TargetsRequest(sequences=list(generator.integers(0, 256, (sequences, length))), top_k=TOP_K,
                       temperatures=(2.0,))
        for _ in range(count)
    ]  # fmt: skip


@asynccontextmanager
async def teacher(args: argparse.Namespace, *options: str) -> AsyncIterator[str]:
    """Start a service with a key for each student; yields its URL."""
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
        keys.write("\n".join(f"{name} {key}" for name, key in KEYS.items()))
        keys.flush()
        port = free_port()
        command = ["teacher_service.main", str(args.model), "--engine", args.engine, "--port", str(port),
                   "--keys", keys.name, "--log-level", "warning", "--window", "4096", "--max-model-len", "2048",
                   *options]  # fmt: skip
        with child(command) as process:
            url = f"http://127.0.0.1:{port}"
            await until_healthy(url, process)
            yield url


async def sources(url: str) -> dict[str, int]:
    """Tokens served so far, by where their targets came from."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEYS['ada']}"}) as client:
        return (await client.get(f"{url}/v1/status")).json()["sources"]


async def epoch(url: str, name: str, data: list[TargetsRequest], pause_s: float = 0.0, ahead: int = 4) -> None:
    """One student reads the data in order with `ahead` batches in flight, like the trainer's prefetch."""
    async with TeacherClient(url, key=KEYS[name]) as client:
        room = asyncio.Semaphore(ahead)

        async def one(request: TargetsRequest) -> None:
            async with room:
                await client.targets(request)
                await asyncio.sleep(pause_s)

        await asyncio.gather(*(one(request) for request in data))


async def same_data(url: str, data: list[TargetsRequest]) -> float:
    """Forward passes of four students on the same data; the slowest trains about as long as scoring a batch takes."""
    before = (await sources(url)).get("engine", 0)
    began = time.monotonic()
    await epoch(url, "ada", data[:1])
    pace = (time.monotonic() - began) * 4
    await asyncio.gather(*(epoch(url, name, data, pause_s=i * pace / 3) for i, name in enumerate(STUDENTS)))
    computed = (await sources(url)).get("engine", 0) - before - CANARY_TOKENS * (1 + len(STUDENTS))
    return computed / sum(request.num_tokens for request in data)


async def different_data(url: str, seconds: float) -> dict[str, float]:
    """Each student's share of the tokens received in the second half of `seconds`."""
    tokens = dict.fromkeys(STUDENTS, 0)
    began = time.monotonic()

    async def connection(client: TeacherClient, name: str, seed: int) -> None:
        while True:
            (request,) = batches(1, 4, 64, seed=seed)  # 8 connections keep twice a student's share in flight
            seed += 1
            await client.targets(request)
            if time.monotonic() - began > seconds / 2:
                tokens[name] += request.num_tokens

    clients = {name: TeacherClient(url, key=KEYS[name]) for name in STUDENTS}
    work = [
        asyncio.create_task(connection(clients[name], name, 10**9 * (i + 1) + 10**6 * n))
        for i, name in enumerate(STUDENTS) for n in range(CONNECTIONS[name])
    ]  # fmt: skip
    _, running = await asyncio.wait(work, timeout=seconds)
    for task in running:
        task.cancel()
    results = await asyncio.gather(*work, return_exceptions=True)
    failures = [result for result in results if not isinstance(result, asyncio.CancelledError)]
    for client in clients.values():
        await client.close()
    if failures:
        raise RuntimeError(f"a student ended too early: {failures[0]!r}")
    return {name: count / sum(tokens.values()) for name, count in tokens.items()}


async def two_epochs(args: argparse.Namespace, data: list[TargetsRequest]) -> dict[str, float]:
    """Tokens computed by the engine in each epoch divided by those of the data; the second is after a restart."""
    passes = {}
    total = sum(request.num_tokens for request in data)
    with tempfile.TemporaryDirectory() as store:
        for name in ("first epoch", "second epoch"):
            async with teacher(args, "--store", store) as url:
                began = time.monotonic()
                await epoch(url, "ada", data)
                passes[name] = ((await sources(url)).get("engine", 0) - CANARY_TOKENS) / total
                print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return passes


async def run(args: argparse.Namespace) -> dict[str, float]:
    data = batches(args.batches, 4, 128)
    async with teacher(args) as url:
        passes = await same_data(url, data)
        shares = await different_data(url, args.seconds)
    return {"same data": passes} | shares | await two_epochs(args, data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.share", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "demo" / "teacher")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--batches", type=int, default=16, help="batches of 4 sequences of 128 tokens")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the part on different data")
    args = parser.parse_args()
    found = asyncio.run(run(args))
    kept = {
        "same data": found["same data"] <= MOST_PASSES,
        **{name: abs(found[name] - SHARE) <= WITHIN for name in STUDENTS},
        "first epoch": True,
        "second epoch": found["second epoch"] == 0,
    }
    what = {
        "same data": f"forward passes for four students, at most {MOST_PASSES}",
        **{n: f"share of the tokens over {CONNECTIONS[n]} connections, {SHARE} within {WITHIN}" for n in STUDENTS},
        "first epoch": "forward passes with an empty store",
        "second epoch": "forward passes with what the first left, none",
    }
    rows = [{"what": f"{name}: {what[name]}", "figure": found[name], "kept": "yes" if kept[name] else "NO"}
            for name in found]  # fmt: skip
    report("share", rows, found, title="Four students, one teacher")
    if not all(kept.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
