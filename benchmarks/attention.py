"""Tokens per second and bytes per token of the attention service, compared with a full eager forward pass.

    python -m benchmarks.attention [--sequences 8] [--length 512] [--rounds 3]

The service runs in another process, over HTTP, at its default layer, in float32 on the demo's teacher. It is timed at
the client, including encoding and checks. The baseline is what one would do without it: the whole transformers model
with eager attention and `output_attentions=True`, in this process, on as many tokens and threads. All take turns in
each round, and every call gets new texts, because the service caches its latest responses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report import report
from benchmarks.servers import END_WITH_ME
from teacher_proto.attention import AttentionRequest
from teacher_proto.client.sync_client import SyncAttentionClient

DEMO = Path(__file__).resolve().parent.parent / ".cache" / "demo"
LEAST_RATIO = 1.5
KINDS: dict[str, dict[str, Any]] = {
    "states": {},
    "states, int8": {"dtype": "int8"},
    "relations, R = 32": {"kind": "relations"},
    "relations, R = 32, every 16th row": {"kind": "relations", "every": 16},
    "maps": {"kind": "maps"},
    "maps, blocks of 32": {"kind": "maps", "block_size": 32},
}


def main() -> None:
    options = _options()
    texts = _texts(options.sequences * options.length * options.rounds * (len(KINDS) + 1) + 1)
    whole = AutoModelForCausalLM.from_pretrained(DEMO / "teacher", dtype=torch.float32, attn_implementation="eager")
    whole.eval()
    batches = _batches(texts, options.sequences, options.length)
    tokens = options.sequences * options.length
    seconds: dict[str, list[float]] = {kind: [] for kind in ("whole eager forward, output_attentions", *KINDS)}
    sizes: dict[str, float] = {}
    with _service() as url, SyncAttentionClient(url) as client:
        layer = client.teacher(60).shape.max_layer
        warm = texts[: options.length]
        _whole_forward(whole, [warm])
        client.attention(AttentionRequest(sequences=(warm,)))
        for _ in range(options.rounds):
            batch = next(batches)
            peer = next(iter(seconds))
            seconds[peer].append(_timed(lambda batch=batch: _whole_forward(whole, batch)))  # type: ignore[misc]
            for kind, fields in KINDS.items():
                request = _request(next(batches), fields)
                before = client.client.stats.bytes_received
                seconds[kind].append(_timed(lambda request=request: client.attention(request)))  # type: ignore[misc]
                sizes[kind] = (client.client.stats.bytes_received - before) / tokens
    _report(seconds, sizes, tokens, layer, options)


def _report(
    seconds: dict[str, list[float]], sizes: dict[str, float], tokens: int, layer: int, options: argparse.Namespace
) -> None:
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    rows = [
        {"what": name, "tokens/s": rate, "slowest": tokens / max(seconds[name]), "bytes a token": sizes.get(name, 0.0)}
        for name, rate in rates.items()
    ]
    peer = next(iter(rates))
    ratios = {name: rate / rates[peer] for name, rate in rates.items() if name != peer}
    kept = ratios["states"] >= LEAST_RATIO
    notes = [
        f"{options.sequences} sequences of {options.length} tokens per request, median of {options.rounds} rounds, "
        f"layer {layer}, {torch.get_num_threads()} threads; ratios are to the whole eager forward pass.",
        f"States at the default layer at least {LEAST_RATIO} times as fast: {'met' if kept else 'not met'}.",
    ]
    report("attention", rows, ratios, title="The attention service", notes=notes)
    if not kept:
        sys.exit(1)


def _request(batch: list[np.ndarray], fields: dict[str, Any]) -> AttentionRequest:
    fields = dict(fields)
    every = fields.pop("every", None)
    rows = None if every is None else tuple(np.arange(0, len(tokens_T), every) for tokens_T in batch)
    return AttentionRequest(sequences=tuple(batch), rows=rows, **fields)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def _whole_forward(model: Any, batch: list[np.ndarray]) -> None:
    output = model(torch.tensor(np.stack(batch)), output_attentions=True, use_cache=False)
    assert output.attentions[-1].shape[-1] == len(batch[0])


def _texts(num_tokens: int) -> np.ndarray:
    """`num_tokens` token ids of the demo's prose, repeated if it is shorter."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "teacher")
    lines = (DEMO / "text" / "prose.jsonl").read_text().splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)
    ids = np.array(tokenizer(text[: num_tokens * 6], verbose=False)["input_ids"])
    return np.resize(ids, num_tokens)


def _batches(tokens: np.ndarray, sequences: int, length: int) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(tokens) - sequences * length, sequences * length):
        yield list(tokens[start : start + sequences * length].reshape(sequences, length))


@contextmanager
def _service() -> Iterator[str]:
    """Serve the demo's teacher with as many threads as this process has; yields the service's URL."""
    command = [
        sys.executable,
        "-m",
        "attention_service.main",
        str(DEMO / "teacher"),
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    environment = os.environ | END_WITH_ME
    with subprocess.Popen(
        [*command, "--log-level", "error"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert "ready at" in line, "the service ended before it was ready"
            yield line.split("ready at ")[1].split(",")[0]
        finally:
            process.terminate()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
