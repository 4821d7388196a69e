"""Tokens per second of training on this CPU, compared with its speed on the same matrix products alone.

    python -m benchmarks.train_cpu                       24 layers of SmolLM2-135M's shape, 256 and 512 tokens a step
    python -m benchmarks.train_cpu --layers 6 --tokens 256 --steps 4

The trainer's own loop runs in this process, with random weights and a random top-64 teacher: cross-entropy and KL,
backward, clipping, AdamW. A step is timed as in metrics.jsonl, including data, waiting for targets and logging. The
products are those of one step (forward, gradient of the inputs, gradient of the weights), each at its own shape, in the
student's compute dtype, into preallocated memory. `share` is the fraction of a step that they would take alone: at 1,
nothing else takes time. `square` is one large product, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import report
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.targets.protocol import Queries
from student_trainer.targets.queries import spec_of
from teacher_proto.hardware import auto_dtype
from teacher_proto.targets import TokenTargets
from tests.models import save_tiny_llama
from tests.trainer_run import TOKENS, ScriptedTargets, run_here, teacher_script

ROOT = Path("runs/train_cpu")
# SmolLM2-135M's, except for the number of layers.
HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 576, 1536, 9, 3, 64, 49_152
TOP_K = 64
WARM = 2  # warm-up steps, not counted
SQUARE = 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512], help="tokens per step, in rows of 256")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--compute", choices=("auto", "float32", "bfloat16"), default="auto")
    options = parser.parse_args()
    dtype = auto_dtype("cpu") if options.compute == "auto" else getattr(torch, options.compute)
    prepare(options.layers)
    rows = [measure(options, tokens, dtype) for tokens in options.tokens]
    notes = [
        f"{torch.get_num_threads()} threads, torch kernels for {torch.backends.cpu.get_cpu_capability()}, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')}",
        "GFLOP/s of a step: 6 x multiplied weights x tokens, divided by its median time; attention, losses and AdamW "
        "add time only",
    ]
    ratios = {f"products' share of a step of {row['tokens']} tokens (target 0.7)": row["share"] for row in rows}
    shown = f"A training step: {options.layers} layers, hidden {HIDDEN}, V={VOCABULARY}, {str(dtype)[6:]}"
    report("train_cpu", rows, ratios, title=shown, notes=notes)
    return 0


def shapes(layers: int) -> list[tuple[int, int, int]]:
    """(in, out, how many) of the matrices that every token is multiplied by; the last is the head."""
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    per_layer = [(HIDDEN, wide, 1), (HIDDEN, narrow, 2), (wide, HIDDEN, 1), (HIDDEN, MLP, 2), (MLP, HIDDEN, 1)]
    return [(i, o, layers * many) for i, o, many in per_layer] + [(HIDDEN, VOCABULARY, 1)]


def flops(layers: int, tokens: int) -> float:
    return 6.0 * tokens * sum(i * o * many for i, o, many in shapes(layers))


def prepare(layers: int) -> None:
    """Make a student of random weights and a file of random tokens."""
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    save_tiny_llama(
        ROOT / "student", vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, tie_word_embeddings=True,
        max_position_embeddings=2048, initializer_range=0.02,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    with (ROOT / "text.jsonl").open("w") as file:
        for _ in range(400):
            file.write(json.dumps({"input_ids": draw.integers(2, TOKENS, 180).tolist()}) + "\n")


class RandomTargets(ScriptedTargets):
    """A teacher that costs nothing: the same random 64 ids and logprobs for every row."""

    def __init__(self) -> None:
        super().__init__(teacher_script(vocab_size=VOCABULARY))
        draw = np.random.default_rng(1)
        # No token of the text is among them, so that they cannot contradict a token's own logprob.
        self._ids_K = np.sort(draw.choice(np.arange(TOKENS, VOCABULARY), TOP_K, replace=False)).astype(np.uint16)
        logits = np.sort(draw.normal(size=TOP_K) * 2)[::-1]
        self._logprobs_K = (logits - np.log(np.exp(logits).sum()) - 0.1).astype(np.float16)

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        answers = [None if query is None else self._answer(*query.rows, len_=query.num_tokens) for query in queries]
        return BatchTargets(tuple(answers), spec_of(queries), self.engine.identity.fingerprint)

    def _answer(self, start: int, stop: int, len_: int) -> TokenTargets:
        count = stop - start
        next_R = np.full(count, float(self._logprobs_K[-1]) - 1.0, dtype=np.float32)
        if stop == len_:
            next_R[-1] = np.nan
        return TokenTargets(
            start=start, ids=np.tile(self._ids_K, (count, 1)), logprobs=np.tile(self._logprobs_K, (count, 1)),
            lse=np.zeros(count, dtype=np.float32), next_logprob=next_R,
        )  # fmt: skip


def measure(options: argparse.Namespace, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    products_s = [products(options.layers, tokens, dtype)]
    seconds = steps(options, tokens, dtype)
    # The faster of before and after, so that other load during one of them does not count.
    products_s.append(products(options.layers, tokens, dtype))
    step_s, work = statistics.median(seconds), flops(options.layers, tokens)
    return {
        "tokens": tokens, "s": step_s, "tokens/s": tokens / step_s, "GFLOP/s": work / step_s / 1e9,
        "products GFLOP/s": work / min(products_s) / 1e9, "square GFLOP/s": square(dtype),
        "share": min(products_s) / step_s, "share, fastest step": min(products_s) / min(seconds),
    }  # fmt: skip


def steps(options: argparse.Namespace, tokens: int, dtype: torch.dtype) -> list[float]:
    """Seconds of each counted step of the trainer."""
    name = f"{tokens}-tokens"
    code = run_here(
        [
            f"student.checkpoint_path={ROOT / 'student'}", f"student.compute={str(dtype)[6:]}", f"run.root={ROOT}",
            f"run.id={name}", f"run.steps={WARM + options.steps}", "run.device=cpu", "data.seq_len=256",
            f"data.rows={tokens // 256}", "data.held_out_rows=1", "data.workers=1", "teacher.url=http://unused",
            f"teacher.top_k={TOP_K}", "teacher.sanity=off", "distillation=logits_only", "evaluation.every=0",
            "checkpoint.every=0", "logging.wandb=off", "logging.progress=off", f"data.cache_folder={ROOT / 'cache'}",
            *(f"data.sources.text.{field}" for field in (
                "kind=jsonl", "format=tokens", f"path={ROOT / 'text.jsonl'}", "held_out_fraction=0.1")),
        ],
        RandomTargets(),
    )  # fmt: skip
    if code:
        raise SystemExit(f"the trainer ended with {code}")
    lines = (ROOT / name / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(ROOT / name / "checkpoints", ignore_errors=True)
    return [json.loads(line)["seconds"] for line in lines][WARM:]


def products(layers: int, tokens: int, dtype: torch.dtype, repeats: int = 3) -> float:
    """Seconds that the products of one step take alone: the fastest of `repeats` for each shape."""
    total = 0.0
    for inside, outside, many in shapes(layers):
        x_NI, w_OI = torch.randn(tokens, inside, dtype=dtype), torch.randn(outside, inside, dtype=dtype)
        g_NO, into_NI, into_OI = (
            torch.randn(tokens, outside, dtype=dtype),
            torch.empty_like(x_NI),
            torch.empty_like(w_OI),
        )
        for a, b, out in ((x_NI, w_OI.t(), torch.empty_like(g_NO)), (g_NO, w_OI, into_NI), (g_NO.t(), x_NI, into_OI)):
            total += many * fastest(a, b, out, repeats)
    return total


def square(dtype: torch.dtype) -> float:
    """GFLOP/s of one large product."""
    a, b = torch.randn(SQUARE, SQUARE, dtype=dtype), torch.randn(SQUARE, SQUARE, dtype=dtype)
    return 2 * SQUARE**3 / fastest(a, b, torch.empty_like(a), 5) / 1e9


def fastest(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
    torch.mm(a, b, out=out)
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        torch.mm(a, b, out=out)
        taken.append(time.perf_counter() - begun)
    return min(taken)


if __name__ == "__main__":
    sys.exit(main())
