"""TRL's own client with our teacher, compared with the same client on stock vLLM, in the same run.

    make bench-compat                                         K = 8, 20, 64; 8 sequences of 256 tokens
    make bench-compat ARGS="--sequences 4 --rounds 5"         another model: --model

Contenders: *stock* is `vllm serve` and *ours* is `stillhouse-teacher`, both queried with TRL 1.16's
`VLLMClient.get_sequence_logprobs` the way its distillation trainers do, one batch per request; *targets* is our teacher
queried for the same rows with our client, as in `examples/trl_distill.py`. All servers run at the same time with the
same threads and take turns over the same text, which is new in every round. Tokens are those of whole sequences, and
tokens/s is the median over rounds. CPU is user plus system time per token, of the client's process and of all of the
server's.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import report
from benchmarks.serve import Sequences, text_ids
from benchmarks.servers import ROOT, child, cpu_seconds, stock_environment, until_healthy
from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.requests import TargetsRequest
from tests.teacher_process import free_port

MAX_LENGTH = 1024
TEMPERATURE = 1.0  # at any other, stock vLLM's response differs from ours


@dataclass
class Round:
    seconds: float
    client_s: float
    server_s: float


@dataclass
class Contender:
    """`ask` takes the sequences, the positions where their completions begin, and K."""

    name: str
    pid: int
    ask: Callable[[Sequences, list[int], int], Any]
    rounds: dict[int, list[Round]] = field(default_factory=dict)

    def turn(self, sequences: Sequences, top_k: int) -> Round:
        starts = [len(ids) // 2 for ids in sequences]
        server_s, client_s, began = cpu_seconds(self.pid), time.process_time(), time.perf_counter()
        self.ask(sequences, starts, top_k)
        seconds, client_s = time.perf_counter() - began, time.process_time() - client_s
        return Round(seconds, client_s, cpu_seconds(self.pid) - server_s)


def by_trl(url: str) -> Callable[[Sequences, list[int], int], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL was tested with earlier versions of vLLM
        from trl.generation.vllm_client import VLLMClient

        client = VLLMClient(base_url=url, connection_timeout=60.0)

    def ask(sequences: Sequences, starts: list[int], top_k: int) -> None:
        answer = client.get_sequence_logprobs(sequences, starts, top_logprobs=top_k, temperature=TEMPERATURE)
        assert [len(rows) for rows in answer["logprobs"]] == [
            len(ids) - start for ids, start in zip(sequences, starts, strict=True)
        ]

    return ask


def by_targets(client: SyncTeacherClient) -> Callable[[Sequences, list[int], int], Any]:
    def ask(sequences: Sequences, starts: list[int], top_k: int) -> None:
        rows = [(start - 1, len(ids) - 1) for ids, start in zip(sequences, starts, strict=True)]
        answers = client.targets(TargetsRequest(sequences=sequences, rows=rows, top_k=top_k))
        assert [answer.num_rows for answer in answers] == [stop - start for start, stop in rows]

    return ask


def measure(args: argparse.Namespace, contenders: list[Contender]) -> None:
    ids, at = text_ids(args.model), 0
    for number in range(args.rounds + 1):
        for top_k in args.top_k:
            sequences = [ids[at + i * args.length : at + (i + 1) * args.length] for i in range(args.sequences)]
            at += args.sequences * args.length
            for contender in contenders[number % 2 :] + contenders[: number % 2]:
                result = contender.turn(sequences, top_k)
                if number:  # round 0 warms up: compilation and allocation
                    contender.rounds.setdefault(top_k, []).append(result)
                print(f"{contender.name} K={top_k}: {args.sequences * args.length / result.seconds:.0f} tokens/s",
                      file=sys.stderr)  # fmt: skip


def serve(args: argparse.Namespace, processes: ExitStack) -> list[Contender]:
    """Start the servers, wait until they are healthy, and return the contenders."""
    model, stub = str(args.model), Path(processes.enter_context(tempfile.TemporaryDirectory()))
    stock_port, our_port = free_port(), free_port()
    limits = ["--max-model-len", str(MAX_LENGTH), "--kv-cache-memory-bytes", str(2**29)]
    stock = processes.enter_context(child(
        ["vllm.entrypoints.cli.main", "serve", model, "--port", str(stock_port), "--max-logprobs", "64",
         "--max-num-batched-tokens", "2048", "--max-num-seqs", "64", "--enforce-eager", "--no-enable-prefix-caching",
         "--disable-uvicorn-access-log", *limits],
        stock_environment(stub),
    ))  # fmt: skip
    ours = processes.enter_context(
        child(["teacher_service.main", model, "--port", str(our_port), "--log-level", "warning", *limits])
    )
    stock_url, our_url = (f"http://127.0.0.1:{port}" for port in (stock_port, our_port))

    async def all_up() -> None:
        await asyncio.gather(until_healthy(stock_url, stock), until_healthy(our_url, ours))

    asyncio.run(all_up())
    client = processes.enter_context(SyncTeacherClient(our_url))
    return [
        Contender("stock", stock.pid, by_trl(stock_url)),
        Contender("ours", ours.pid, by_trl(our_url)),
        Contender("targets", ours.pid, by_targets(client)),
    ]


def tabulate(args: argparse.Namespace, contenders: list[Contender]) -> list[dict[str, Any]]:
    tokens = args.sequences * args.length
    return [
        {
            "K": top_k, "contender": contender.name,
            "tokens/s": tokens / statistics.median(each.seconds for each in rounds),
            "client CPU us": 1e6 * statistics.median(each.client_s for each in rounds) / tokens,
            "server CPU us": 1e6 * statistics.median(each.server_s for each in rounds) / tokens,
        }
        for top_k in args.top_k
        for contender in contenders
        if (rounds := contender.rounds[top_k])
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compat", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "demo" / "teacher")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--top-k", nargs="+", type=int, default=[8, 20, 64])
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    from teacher_service.engines.vllm_options import prepare_environment

    prepare_environment()  # thread and memory settings, inherited by every contender
    with ExitStack() as processes:
        contenders = serve(args, processes)
        measure(args, contenders)
        rows = tabulate(args, contenders)
    of = {(row["contender"], row["K"]): row for row in rows}
    figures = {
        f"K{top_k}": {
            "speed_of_stock": of["ours", top_k]["tokens/s"] / of["stock", top_k]["tokens/s"],
            "client_cpu_of_stock": of["ours", top_k]["client CPU us"] / of["stock", top_k]["client CPU us"],
            "targets_speed_of_stock": of["targets", top_k]["tokens/s"] / of["stock", top_k]["tokens/s"],
            "targets_client_cpu_of_stock": of["targets", top_k]["client CPU us"] / of["stock", top_k]["client CPU us"],
        }
        for top_k in args.top_k
    }
    report("compat", rows, figures, title="TRL's client, and ours", notes=["CPU in microseconds per token."])


if __name__ == "__main__":
    main()
