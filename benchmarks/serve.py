"""The teacher service compared with stock vLLM and with the physical limit, in the same run.

    make bench-serve                                    K = 16, 64, 256; 16 sequences of 256 tokens and 8 of 1,024
    make bench-serve ARGS="--top-k 64 --rounds 6"       another teacher: --model; fewer shapes: --shapes 16x256

Contenders: *prefill* and *limit* are vLLM alone, without and with the head's matmul at all positions
(`bare_prefill.py`); *stock* is `vllm serve` queried for `prompt_logprobs`, one request per sequence, with its JSON
parsed into arrays; *ours* is `stillhouse-teacher` queried with `TeacherClient`, with one temperature besides 1. All run
at the same time with the same threads and settings, and take turns over the same text, which is new in every round. A
ratio is the median over rounds. CPU is user plus system time: of all of a server's processes, which gives a second
measure of the ratio that is less sensitive to other load; of its API process alone; and of the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tokenizers import Tokenizer

from benchmarks.report import report
from benchmarks.servers import ROOT, child, cpu_seconds, stock_environment, until_healthy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.requests import TargetsRequest
from tests.teacher_process import free_port

TEXT = ROOT / ".cache" / "demo" / "text"
MAX_LENGTH = 2048
OF_LIMIT, CPU_US, FEWER_CPU = 0.92, 12.0, 70.0

Sequences = list[list[int]]


@dataclass
class Round:
    """One contender's turn over one round's sequences; zeros where there is no API process or client.

    `cpu_s` covers all processes of its server, `api_s` only the one that serves HTTP.
    """

    seconds: float
    cpu_s: float
    api_s: float = 0.0
    client_s: float = 0.0
    bytes: int = 0


@dataclass
class Contender:
    name: str
    turn: Callable[[Sequences, int], Awaitable[Round]]
    rounds: dict[tuple[str, int], list[Round]] = field(default_factory=dict)


# --- the contenders -----------------------------------------------------------------------------------------------


def bare(process: subprocess.Popen, head: bool) -> Callable[[Sequences, int], Awaitable[Round]]:
    async def turn(sequences: Sequences, top_k: int) -> Round:
        assert process.stdin is not None and process.stdout is not None
        cpu_s = cpu_seconds(process.pid)
        process.stdin.write(json.dumps({"head": head, "sequences": sequences}) + "\n")
        process.stdin.flush()
        seconds = float(await asyncio.to_thread(process.stdout.readline))
        return Round(seconds, cpu_seconds(process.pid) - cpu_s)

    return turn


async def timed(process: subprocess.Popen, ask: Callable[[], Awaitable[int]]) -> Round:
    """Time one call of `ask`, which returns the number of bytes received."""
    cpu_s, api_s = cpu_seconds(process.pid), cpu_seconds(process.pid, children=False)
    client_s, began = time.process_time(), time.perf_counter()
    received = await ask()
    seconds, client_s = time.perf_counter() - began, time.process_time() - client_s
    api_s = cpu_seconds(process.pid, children=False) - api_s
    return Round(seconds, cpu_seconds(process.pid) - cpu_s, api_s, client_s, received)


def ours(process: subprocess.Popen, client: TeacherClient) -> Callable[[Sequences, int], Awaitable[Round]]:
    async def turn(sequences: Sequences, top_k: int) -> Round:
        async def ask() -> int:
            before = client.stats.bytes_received
            targets = await client.targets(TargetsRequest(sequences=sequences, top_k=top_k, temperatures=(2.0,)))
            assert all(t.ids is not None and t.ids.shape[1] == top_k for t in targets)
            return client.stats.bytes_received - before

        return await timed(process, ask)

    return turn


def stock(
    process: subprocess.Popen, client: httpx.AsyncClient, model: str
) -> Callable[[Sequences, int], Awaitable[Round]]:
    async def one(ids: list[int], top_k: int) -> int:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        parse_prompt_logprobs(response.content, top_k)
        return len(response.content)

    async def turn(sequences: Sequences, top_k: int) -> Round:
        async def ask() -> int:
            return sum(await asyncio.gather(*(one(ids, top_k) for ids in sequences)))

        return await timed(process, ask)

    return turn


def parse_prompt_logprobs(body: bytes, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """vLLM's `prompt_logprobs` as ids and logprobs [T - 1, K]. The prompt's own token, which vLLM adds if it is not
    among the top K, is dropped."""
    rows = json.loads(body)["choices"][0]["prompt_logprobs"][1:]
    kept = [[(int(i), entry["logprob"]) for i, entry in row.items() if entry["rank"] <= top_k][:top_k] for row in rows]
    pairs_RK2 = np.array(kept, dtype=np.float64)
    return pairs_RK2[..., 0].astype(np.int32), pairs_RK2[..., 1].astype(np.float32)


# --- the run ------------------------------------------------------------------------------------------------------


def text_ids(model: Path) -> list[int]:
    """The demo's text as tokens, enough for all rounds; each round continues where the previous one ended."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids: list[int] = []
    for path in sorted(TEXT.rglob("*.jsonl")):
        with path.open() as lines:
            for line in lines:
                ids += tokenizer.encode(json.loads(line)["text"]).ids
                if len(ids) > 400_000:
                    return ids
    return ids


async def measure(args: argparse.Namespace, contenders: list[Contender]) -> None:
    ids = text_ids(args.model)
    at = 0

    def next_sequences(count: int, length: int) -> Sequences:
        nonlocal at
        if at + count * length > len(ids):
            at = 0
        at += count * length
        return [ids[at - (i + 1) * length : at - i * length] for i in range(count)]

    for contender in contenders:  # warm-up: compilation and allocation
        for top_k in args.top_k:
            await contender.turn(next_sequences(4, 256), top_k)
    for shape in args.shapes:
        count, length = map(int, shape.split("x"))
        for number in range(args.rounds):
            sequences = next_sequences(count, length)
            for contender in contenders:
                if contender.name == "stock" and number >= args.stock_rounds:
                    continue
                for top_k in args.top_k if contender.name in ("stock", "ours") else [0]:
                    result = await contender.turn(sequences, top_k)
                    contender.rounds.setdefault((shape, top_k), []).append(result)
                    print(f"{shape} {contender.name} K={top_k}: {count * length / result.seconds:.0f} tokens/s",
                          file=sys.stderr)  # fmt: skip


def tabulate(args: argparse.Namespace, contenders: list[Contender]) -> list[dict[str, Any]]:
    rows = []
    limits = {c.name: c for c in contenders}["limit"].rounds
    for contender in contenders:
        for (shape, top_k), rounds in contender.rounds.items():
            count, length = map(int, shape.split("x"))
            tokens = count * length
            limit = [a.seconds / b.seconds for a, b in zip(limits[shape, 0], rounds, strict=False)]
            row = {
                "shape": shape, "contender": contender.name, "K": top_k or None,
                "tokens/s": tokens / statistics.median(r.seconds for r in rounds),
                "of limit": statistics.median(limit),
                "CPU us": 1e6 * statistics.median(r.cpu_s for r in rounds) / tokens,
            }  # fmt: skip
            if top_k:
                row |= {
                    "bytes": rounds[0].bytes / tokens,
                    "API us": 1e6 * statistics.mean(r.api_s for r in rounds) / tokens,
                    "client us": 1e6 * statistics.mean(r.client_s for r in rounds) / tokens,
                }
            rows.append(row)
    return sorted(rows, key=lambda row: args.shapes.index(row["shape"]))


def summary(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The quoted results, in stock vLLM's favour: of the measured shapes, the worst of ours and the best of stock's."""

    def of(name: str, top_k: int | None) -> dict[str, dict[str, Any]]:
        return {row["shape"]: row for row in rows if row["contender"] == name and row["K"] == top_k}

    def cpu_us(row: dict[str, Any]) -> float:
        return row["API us"] + row["client us"]

    figures: dict[str, Any] = {}
    limits = of("limit", None)
    for top_k in args.top_k:
        our, their = of("ours", top_k), of("stock", top_k)
        figures[f"K{top_k}"] = {
            "of_limit": min(row["of limit"] for row in our.values()),
            "of_limit_in_cpu": min(limits[shape]["CPU us"] / row["CPU us"] for shape, row in our.items()),
            "bytes_per_token": max(row["bytes"] for row in our.values()),
            "cpu_us_per_token": max(cpu_us(row) for row in our.values()),
        }
        if their:
            figures[f"K{top_k}"] |= {
                "of_stock": min(our[shape]["tokens/s"] / their[shape]["tokens/s"] for shape in their),
                "stock_bytes_per_token": min(row["bytes"] for row in their.values()),
                "stock_cpu_us_per_token": min(cpu_us(row) for row in their.values()),
            }
    return figures


def verdict(figures: dict[str, Any]) -> list[str]:
    at_64 = figures.get("K64")
    if at_64 is None:
        return []
    fewer = at_64.get("stock_cpu_us_per_token", math.inf) / at_64["cpu_us_per_token"]
    kept = at_64["of_limit"] >= OF_LIMIT and at_64["cpu_us_per_token"] <= CPU_US and fewer >= FEWER_CPU
    share = f"1/{fewer:.0f}" if math.isfinite(fewer) else "stock left out"
    return [
        f"At K = 64: at least {OF_LIMIT} of the limit, at most {CPU_US:.0f} us of CPU outside the engine, a "
        f"{FEWER_CPU:.0f}th of stock's or less ({share}): {'met' if kept else 'not met'}."
    ]


async def compare(args: argparse.Namespace) -> list[Contender]:
    model = str(args.model)
    stock_port, our_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as stub, ExitStack() as processes:
        start = processes.enter_context
        limits = start(child(["benchmarks.bare_prefill", model], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        teacher = start(child(["teacher_service.main", model, "--port", str(our_port), "--log-level", "warning",
                               "--max-model-len", str(MAX_LENGTH)]))  # fmt: skip
        servers = [(f"http://127.0.0.1:{our_port}", teacher)]
        if args.stock_rounds:
            vllm = start(child(
                ["vllm.entrypoints.cli.main", "serve", model, "--port", str(stock_port), "--max-logprobs", "256",
                 "--max-model-len", str(MAX_LENGTH), "--max-num-batched-tokens", "2048", "--max-num-seqs", "64",
                 "--enforce-eager", "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(2**30),
                 "--disable-uvicorn-access-log"],
                stock_environment(Path(stub)),
            ))  # fmt: skip
            servers.append((f"http://127.0.0.1:{stock_port}", vllm))
        assert limits.stdout is not None
        while (line := await asyncio.to_thread(limits.stdout.readline)) != "ready\n":
            if not line:
                raise RuntimeError("benchmarks.bare_prefill ended before it was ready")
        await asyncio.gather(*(until_healthy(*server) for server in servers))
        async with AsyncExitStack() as clients:
            client = await clients.enter_async_context(TeacherClient(servers[0][0]))
            contenders = [Contender("prefill", bare(limits, False)), Contender("limit", bare(limits, True)),
                          Contender("ours", ours(teacher, client))]  # fmt: skip
            if args.stock_rounds:
                http = await clients.enter_async_context(httpx.AsyncClient(base_url=servers[1][0], timeout=600))
                contenders.append(Contender("stock", stock(vllm, http, model)))
            await measure(args, contenders)
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "demo" / "teacher")
    parser.add_argument("--shapes", nargs="+", default=["16x256", "8x1024"])
    parser.add_argument("--top-k", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock-rounds", type=int, default=2, help="0 skips stock vLLM")
    args = parser.parse_args()
    from teacher_service.engines.vllm_options import prepare_environment

    prepare_environment()  # thread and memory settings, inherited by every contender
    contenders = asyncio.run(compare(args))
    rows = tabulate(args, contenders)
    figures = summary(args, rows)
    notes = ["CPU in microseconds per token: all server processes, the API process, the client. Bytes per token.",
             *verdict(figures)]  # fmt: skip
    report("serve", rows, figures, title="Scoring over HTTP", notes=notes)
    if any("not met" in note for note in notes):
        sys.exit(1)


if __name__ == "__main__":
    main()
