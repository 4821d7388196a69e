"""Time and peak memory of forward and backward from hidden states: our loss compared with others, in the same run.

    python -m benchmarks.loss                  V = 32,000 and 151,936, as many tokens as the naive form fits in 16 GiB
    python -m benchmarks.loss --of memory --gib 12                peaks of the naive form and ours alone, one call each
    python -m benchmarks.loss --of time --tokens 1024             ours and cross-entropy alone, at any size
    python -m benchmarks.loss --quick          a few hundred tokens, half a minute
    python -m benchmarks.loss --device cuda --dtype bfloat16 --shape 128256x4096 --tokens 8192

Each contender runs in its own process, several times in turn with the others; the shortest time and the largest peak
count. On a CPU the peak is the process's resident memory (VmHWM) above its size once the inputs were made; on a GPU it
is torch's allocated memory, also above the inputs. Every contender's peak includes the gradients of hidden states and
head. TRL and Liger support only dense teachers: theirs is the divergence over the whole vocabulary from the teacher's
hidden states and head, so they also compute the teacher's logits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import report

TOP_K = 64
BUDGET_GIB = 16.0
SHAPES = ("32000x576", "151936x1024")
OURS = "stillhouse: cross-entropy + top-K KL"
NAIVE = "naive: cross-entropy + top-K KL, dense"
PEER = "torch linear_cross_entropy alone"


@dataclass(frozen=True)
class Inputs:
    """Inputs of every contender: top-K targets for each row, and a dense teacher of the student's width."""

    hidden_ND: Any
    weight_VD: Any
    labels_N: Any
    ids_NK: Any
    logprobs_NK: Any
    teacher_hidden_ND: Any
    teacher_weight_VD: Any


def naive(x: Inputs) -> None:
    """The textbook form; one log_softmax serves both losses."""
    import torch

    log_q_NV = torch.log_softmax((x.hidden_ND @ x.weight_VD.T).float(), -1)
    cross_entropy = torch.nn.functional.nll_loss(log_q_NV, x.labels_N, reduction="sum")
    log_q_NK, log_p_NK = log_q_NV.gather(1, x.ids_NK), x.logprobs_NK.float()
    log_q_tail_N = torch.log1p(-log_q_NK.exp().sum(-1).clamp(max=1 - 1e-7))
    p_tail_N = 1 - log_p_NK.exp().sum(-1)
    kl_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1) + p_tail_N * (p_tail_N.log() - log_q_tail_N)
    ((0.5 * cross_entropy + kl_N.sum()) / len(x.labels_N)).backward()


def linear_cross_entropy(x: Inputs) -> None:
    import torch

    torch.nn.functional.linear_cross_entropy(x.hidden_ND, x.weight_VD, x.labels_N).backward()


def linear_cross_entropy_chunked(x: Inputs) -> None:
    import torch

    options = torch.nn.LinearCrossEntropyOptions(acc_policy="accurate", chunking_method="aspect_ratio")
    torch.nn.functional.linear_cross_entropy(x.hidden_ND, x.weight_VD, x.labels_N, options=options).backward()


def trl_chunked(x: Inputs) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher = (x.teacher_hidden_ND, x.teacher_weight_VD, None)
    kl_N, _entropy = ChunkedDivergenceFunction.apply(x.hidden_ND, x.weight_VD, None, *teacher, 0.0)
    kl_N.mean().backward()


def liger_fused(x: Inputs) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.5, 1.0, 0.5, compiled=x.hidden_ND.is_cuda)
    loss(x.hidden_ND, x.weight_VD, x.teacher_hidden_ND, x.teacher_weight_VD, x.labels_N).backward()


def ours(x: Inputs) -> None:
    _ours(x, with_teacher=True)


def ours_cross_entropy(x: Inputs) -> None:
    _ours(x, with_teacher=False)


def _ours(x: Inputs, with_teacher: bool) -> None:
    from student_trainer.losses import TeacherRows, head_loss, token_term

    terms = [token_term("ce", "cross_entropy", 0.5), token_term("kd", "top_k_kl", 1.0)]
    rows = TeacherRows(ids_NK=x.ids_NK, logprobs_NK=x.logprobs_NK)
    result = head_loss(x.hidden_ND, x.weight_VD, x.labels_N, rows, terms if with_teacher else terms[:1])
    (result.total / len(x.labels_N)).backward()


CONTENDERS: dict[str, Callable[[Inputs], None]] = {
    NAIVE: naive,
    PEER: linear_cross_entropy,
    f"{PEER}, chunked": linear_cross_entropy_chunked,
    "trl chunked KL (dense teacher)": trl_chunked,
    "liger fused JSD + cross-entropy (dense teacher)": liger_fused,
    "stillhouse: cross-entropy alone": ours_cross_entropy,
    OURS: ours,
}


QUESTIONS = {
    "everything": tuple(CONTENDERS),
    "memory": (NAIVE, OURS),
    "time": (PEER, f"{PEER}, chunked", "stillhouse: cross-entropy alone", OURS),
}


def make_inputs(vocab: int, width: int, tokens: int, device: str, dtype_name: str) -> Inputs:
    """Random inputs whose logits spread like a trained model's, made without an array of tokens x vocabulary."""
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    logprobs_NK = torch.randn(tokens, TOP_K, device=device).log_softmax(-1) - 0.1
    ids_NK = torch.randint(vocab // TOP_K, (tokens, TOP_K), device=device)
    return Inputs(
        hidden_ND=normal(tokens, width).requires_grad_(),
        weight_VD=normal(vocab, width, scale=3 / width**0.5).requires_grad_(),
        labels_N=torch.randint(vocab, (tokens,), device=device),
        ids_NK=ids_NK + torch.arange(TOP_K, device=device) * (vocab // TOP_K),
        logprobs_NK=logprobs_NK.sort(-1, descending=True).values.half(),
        teacher_hidden_ND=normal(tokens, width),
        teacher_weight_VD=normal(vocab, width, scale=3 / width**0.5),
    )


class PeakMemory:
    """Peak bytes since `start`, above what was held then."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def start(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            # Writing "5" resets the high-water mark VmHWM to the current resident size; see proc(5).
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")

    def stop(self) -> int:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated() - self.before
        return self._status("VmHWM") - self.before

    def _status(self, field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"/proc/self/status has no {field}")


def measure(name: str, arguments: argparse.Namespace, vocab: int, width: int, tokens: int) -> dict[str, float]:
    """Run one contender in this process: {"seconds", "peak_bytes"}. The first call is not timed unless it is alone."""
    import torch

    # Warm up: imports, thread pools and kernels must not count as the contender's memory or time.
    CONTENDERS[name](make_inputs(TOP_K * 2, width, 8, arguments.device, arguments.dtype))
    x = make_inputs(vocab, width, tokens, arguments.device, arguments.dtype)
    peak, seconds = 0, []
    for call in range(1 + arguments.repeats):
        x.hidden_ND.grad = x.weight_VD.grad = None
        memory = PeakMemory(arguments.device)
        memory.start()
        began = time.perf_counter()
        CONTENDERS[name](x)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        if call or not arguments.repeats:
            seconds.append(time.perf_counter() - began)
        peak = max(peak, memory.stop())
    return {"seconds": min(seconds), "peak_bytes": peak}


def in_a_process(name: str, arguments: argparse.Namespace, shape: str, tokens: int) -> dict[str, float]:
    """`measure` in a fresh process. RuntimeError with the end of its stderr if it fails."""
    command = [sys.executable, "-m", "benchmarks.loss", "--one", name, "--shape", shape, "--tokens", str(tokens)]
    command += ["--device", arguments.device, "--dtype", arguments.dtype, "--repeats", str(arguments.repeats)]
    # Freed arrays go back to the system at once, so that resident memory means memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tokens_for(arguments: argparse.Namespace, shape: str) -> int:
    """`--tokens`, or the multiple of 256 rows that the naive form fits in the budget, by its peaks at 512 and 1,024."""
    if arguments.tokens:
        return arguments.tokens
    low, high = (in_a_process(NAIVE, arguments, shape, rows)["peak_bytes"] for rows in (512, 1024))
    bytes_a_row = (high - low) / 512
    return 512 + int((arguments.gib * 2**30 - low) / bytes_a_row) // 256 * 256


def compare(arguments: argparse.Namespace, shape: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(table rows, ratios) for one shape."""
    tokens = tokens_for(arguments, shape)
    best: dict[str, dict[str, float]] = {}
    for turn in range(arguments.rounds):
        for name in QUESTIONS[arguments.of]:
            print(f"{shape}, {tokens} tokens, round {turn + 1}: {name}", file=sys.stderr, flush=True)
            got = in_a_process(name, arguments, shape, tokens)
            seen = best.setdefault(name, got)
            seen["seconds"] = min(seen["seconds"], got["seconds"])
            seen["peak_bytes"] = max(seen["peak_bytes"], got["peak_bytes"])
    rows = [
        {
            "vocabulary x width": shape,
            "tokens": tokens,
            "contender": name,
            "seconds": got["seconds"],
            "us a token": got["seconds"] / tokens * 1e6,
            "peak MiB": got["peak_bytes"] / 2**20,
        }
        for name, got in best.items()
    ]
    ratios = {}
    if NAIVE in best:
        peaks = best[OURS]["peak_bytes"], best[NAIVE]["peak_bytes"]
        ratios[f"{shape}: peak, naive = 1 (target 0.125)"] = peaks[0] / peaks[1]
        if arguments.repeats:
            ratios[f"{shape}: time, naive = 1"] = best[OURS]["seconds"] / best[NAIVE]["seconds"]
    if PEER in best:
        alone = min(best[PEER]["seconds"], best[f"{PEER}, chunked"]["seconds"])
        ratios[f"{shape}: time, cross-entropy alone = 1 (target 1.15)"] = best[OURS]["seconds"] / alone
    return rows, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="VOCABULARYxWIDTH, may be repeated")
    parser.add_argument("--tokens", type=int, help="rows; default: as many as the naive form fits in --gib")
    parser.add_argument("--gib", type=float, default=BUDGET_GIB, help="memory budget of the naive form")
    parser.add_argument("--of", choices=QUESTIONS, default="everything", help="what to measure, for which contenders")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=1, help="timed calls per process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender")
    parser.add_argument("--quick", action="store_true", help="512 tokens of small shapes, one round")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.rounds, arguments.shape = 512, 1, ["8000x64", "32000x64"]
    if arguments.of == "memory":
        arguments.repeats, arguments.rounds = 0, 1
    if arguments.one:
        vocab, width = (int(part) for part in arguments.shape[0].split("x"))
        print(json.dumps(measure(arguments.one, arguments, vocab, width, arguments.tokens)))
        return
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for shape in arguments.shape or SHAPES:
        shape_rows, shape_ratios = compare(arguments, shape)
        rows += shape_rows
        ratios |= shape_ratios
    on_cpu = (arguments.device, arguments.dtype) == ("cpu", "float32")
    parts = [
        "" if on_cpu else f"-{arguments.device}-{arguments.dtype}",
        "" if arguments.of == "everything" else f"-{arguments.of}",
        "-quick" if arguments.quick else "",
    ]
    report("loss" + "".join(parts), rows, ratios, title="forward + backward from hidden states")


if __name__ == "__main__":
    main()
