"""Measures time and peak memory of the fused head, forward and backward, next to Liger's and plain cross-entropy's.

The contenders and inputs are those of `benchmarks/loss.py`, in this process, with hidden states and head in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import loss
from deploy.gpu_checks.reduction import least_seconds
from deploy.gpu_checks.report import Options, Report

PLAIN, LIGER_CE, LIGER_JSD = "torch linear and cross-entropy", "liger fused cross-entropy", "liger fused JSD"


def plain_cross_entropy(x: loss.Inputs) -> None:
    logits_NV = torch.nn.functional.linear(x.hidden_ND, x.weight_VD)
    torch.nn.functional.cross_entropy(logits_NV, x.labels_N).backward()


def liger_cross_entropy(x: loss.Inputs) -> None:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    LigerFusedLinearCrossEntropyLoss()(x.weight_VD, x.hidden_ND, x.labels_N).backward()


CONTENDERS: dict[str, Callable[[loss.Inputs], None]] = {
    loss.OURS: loss.ours,
    "stillhouse: cross-entropy alone": loss.ours_cross_entropy,
    PLAIN: plain_cross_entropy,
    loss.PEER: loss.linear_cross_entropy,
    LIGER_CE: liger_cross_entropy,
    LIGER_JSD: loss.liger_fused,
}


def run(report: Report, options: Options) -> None:
    tokens, width, vocab_size, rounds = (64, 32, 1000, 2) if options.tiny else (8192, 4096, 128_256, 5)
    dtype = "float32" if options.tiny else "bfloat16"
    x = loss.make_inputs(vocab_size, width, tokens, options.device, dtype)
    report.note(f"[{tokens:,}, {width:,}] x {vocab_size:,} in {dtype}, top-{loss.TOP_K} KL and cross-entropy together")
    found: dict[str, tuple[float, int]] = {}
    for name, contender in CONTENDERS.items():
        try:
            found[name] = _measured(contender, x, rounds, options)
        except Exception as error:  # a peer may be missing, too old or out of memory: the others still count
            if "stillhouse" in name:
                raise
            report.note(f"{name}: not measured ({type(error).__name__}: {str(error).strip().splitlines()[:1]})")
            continue
        seconds, peak = found[name]
        report.figure(f"{name}: time", seconds * 1e3, "ms")
        if options.device == "cuda":
            report.figure(f"{name}: peak above the inputs", peak / 1e9, "GB")
    _compare(report, found, x.weight_VD.nbytes + x.hidden_ND.nbytes)


def _measured(
    contender: Callable[[loss.Inputs], None], x: loss.Inputs, rounds: int, options: Options
) -> tuple[float, int]:
    """(seconds, bytes)."""

    def once() -> None:
        x.hidden_ND.grad = x.weight_VD.grad = None
        contender(x)

    once()
    x.hidden_ND.grad = x.weight_VD.grad = None
    memory: Any = loss.PeakMemory(options.device)
    memory.start()
    once()
    peak = memory.stop()
    return least_seconds(once, rounds, options.device), peak


def _compare(report: Report, found: dict[str, tuple[float, int]], gradient_bytes: int) -> None:
    seconds, peak = found[loss.OURS]
    peers = [found[name][0] for name in (PLAIN, loss.PEER, LIGER_CE) if name in found]
    if peers:
        report.figure("our time, best cross-entropy = 1", seconds / min(peers), "", "at most 1.1")
    if LIGER_JSD in found:
        report.figure("our time, Liger's JSD = 1", seconds / found[LIGER_JSD][0], "", "at most 0.6")
        report.figure("our peak, Liger's JSD = 1", peak / max(found[LIGER_JSD][1], 1), "", "at most 0.5")
    report.figure("our peak beyond the inputs and their gradients", (peak - gradient_bytes) / 1e9, "GB", "at most 1")
