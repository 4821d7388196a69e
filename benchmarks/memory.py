"""Peak memory for one long sequence with a large vocabulary: the teacher service and stock vLLM, in the same run.

    make bench-memory                          8,000 tokens, V = 151,936, K = 64 and 256, a random model of two layers

Measured is the peak resident size of the server's processes (VmHWM, reset before each request) above their size before
the request. The weights are small, so that the request's own memory shows; the logits of the whole sequence alone would
take tokens x V x 4 bytes. Stock vLLM also runs in steps of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.report import report
from benchmarks.servers import ROOT, child, stock_environment, until_healthy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.requests import TargetsRequest
from tests.teacher_process import free_port

MOST_GIB = 1.0
TOKENIZER = ROOT / ".cache" / "demo" / "teacher"


def save_model(folder: Path, vocab_size: int, positions: int) -> None:
    """Save a random bf16 Llama of two layers, with the demo's tokenizer because stock vLLM requires one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                         max_position_embeddings=positions)  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


async def growth(pid: int, ask: Callable[[], Awaitable[Any]]) -> int:
    """Peak bytes of a server and its children during `ask`, above what they held before."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    for process in processes:
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    before = sum(process.memory_info().rss for process in processes)
    await ask()
    return sum(_peak(process.pid) for process in processes) - before


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


async def ours(model: Path, tokens: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    port, rows = free_port(), []
    with child(["teacher_service.main", str(model), "--port", str(port), "--log-level", "warning"]) as process:
        url = f"http://127.0.0.1:{port}"
        await until_healthy(url, process)
        async with TeacherClient(url) as client:
            await client.targets(TargetsRequest(sequences=[tokens[:2048]], top_k=1))
            for top_k in args.top_k:
                request = TargetsRequest(sequences=[tokens], top_k=top_k, temperatures=(2.0, 5.0))
                took = await growth(process.pid, partial(client.targets, request))
                rows.append({"server": "stillhouse", "K": top_k, "GiB": took / 2**30})
    return rows


async def stock(model: Path, tokens: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    port, rows = free_port(), []
    with tempfile.TemporaryDirectory() as stub, child(
        ["vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port), "--max-logprobs", "256",
         "--max-num-batched-tokens", "2048", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)],
        stock_environment(Path(stub)),
    ) as process:  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        await until_healthy(url, process)
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:

            async def ask(ids: list[int], top_k: int) -> None:
                body = {"model": str(model), "prompt": ids, "max_tokens": 1, "prompt_logprobs": top_k}
                (await client.post("/v1/completions", json=body)).raise_for_status()

            await ask(tokens[:2048], 1)
            for top_k in args.top_k:
                took = await growth(process.pid, partial(ask, tokens, top_k))
                rows.append({"server": "stock vLLM", "K": top_k, "GiB": took / 2**30})
    return rows


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    tokens = np.random.default_rng(0).integers(0, 49_000, args.tokens).tolist()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), args.vocab_size, args.tokens + 8)
        rows = await ours(Path(folder), tokens, args)
        return rows if args.no_stock else rows + await stock(Path(folder), tokens, args)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--no-stock", action="store_true", help="leave stock vLLM out")
    args = parser.parse_args()
    from teacher_service.engines.vllm_options import prepare_environment

    prepare_environment()
    rows = asyncio.run(run(args))
    most = max(row["GiB"] for row in rows if row["server"] == "stillhouse")
    whole = args.tokens * args.vocab_size * 4 / 2**30
    notes = [f"All logits of the sequence in fp32 would take {whole:.1f} GiB.",
             f"At most {MOST_GIB:.0f} GiB for ours: {'met' if most <= MOST_GIB else 'not met'}."]  # fmt: skip
    ratios = {f"{row['server']} K{row['K']}": row["GiB"] for row in rows}
    report("memory", rows, ratios, title=f"{args.tokens:,} tokens, V = {args.vocab_size:,}", notes=notes)
    if most > MOST_GIB:
        sys.exit(1)


if __name__ == "__main__":
    main()
