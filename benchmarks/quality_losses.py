"""The table of losses: how much of the gap between cross-entropy and full KL each closes, by the bytes that it reads.

Made by `quality`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.quality_runs import ROOT, Size, alone, heal, local_teacher, measure, student_of
from benchmarks.quality_targets import bytes_a_token, stored
from benchmarks.seeded_results import Cell, Line, by_seed, gap_closed, interval, spread

NAME = "losses"
PLAIN, FULL, TAIL = "cross-entropy alone", "full KL, from hidden states", "top-64 and tail"
# Arm -> (the targets that it reads, its settings).
ARMS: dict[str, tuple[str | None, list[str]]] = {
    PLAIN: (None, ["teacher=none", *alone("cross_entropy")]),
    FULL: ("hidden", alone("forward_kl", support="full")),
    TAIL: ("top-64", alone("forward_kl")),
    "renormalised top-64": ("top-64", alone("forward_kl", tail="renormalise")),
    "sampled-50": ("sampled-50", [*alone("sampled"), "distillation.samples=50"]),
    "top-16 and tail": ("top-16", [*alone("forward_kl"), "teacher.top_k=16"]),
    "top-256 and tail": ("top-256", [*alone("forward_kl"), "teacher.top_k=256"]),
    "sampled-12": ("sampled-12", [*alone("sampled"), "distillation.samples=12"]),
    "0.5 cross-entropy + top-64 and tail": ("top-64", ["distillation=logits_only"]),
}
MOST = 5
ORDER = (
    PLAIN, "renormalised top-64", "sampled-12", "sampled-50", "top-16 and tail", "top-64 and tail", "top-256 and tail",
    "0.5 cross-entropy + top-64 and tail", FULL,
)  # fmt: skip


def about(size: Size) -> str:
    return f"{size.what}, {size.tokens:,} tokens per run"


def cells(size: Size, seeds: Sequence[int]) -> list[Cell]:
    """The most telling arms first, on the more deeply pruned student and then on the other, which has only these."""
    deep, shallow = size.keep[1], size.keep[0]
    most, others = list(ARMS)[:MOST], list(ARMS)[MOST:]
    return [
        {"arm": arm, "keep": keep, "seed": seed}
        for keep, arms in ((deep, most), (shallow, most), (deep, others)) for seed in seeds for arm in arms
    ]  # fmt: skip


def make(size: Size, cell: Cell) -> Line:
    settings = ARMS[cell["arm"]][1]
    student = heal(size, student_of(size, cell["keep"]), cell["seed"], [*teacher_for(size, cell), *settings])
    return measure(size, student.model)


def teacher_for(size: Size, cell: Cell) -> list[str]:
    """Full KL needs the teacher's head, which no store has."""
    kind = ARMS[cell["arm"]][0]
    if kind is None:
        return []
    return (
        local_teacher(size) if kind == "hidden" else ["teacher=cached", f"teacher.store={stored(size, cell['seed'])}"]
    )


def rows(size: Size, lines: Sequence[Line]) -> list[dict[str, Any]]:
    num_bytes = _bytes(size, lines[0]["seed"])
    made = []
    for keep in size.keep:
        here = [line for line in lines if line["keep"] == keep]
        figures = {
            (arm, figure): by_seed([line for line in here if line["arm"] == arm], figure)
            for arm in ARMS for figure in ("kl", "cross_entropy", "agreement")
        }  # fmt: skip
        for arm in ORDER:
            kl = figures[arm, "kl"]
            if not kl:
                continue
            kind = ARMS[arm][0]
            made.append({
                "loss": arm, "layers": f"{keep} of {size.layers}",
                "bytes per token": round(num_bytes[kind]) if kind else 0,
                "KL": spread(list(kl.values()), 3),
                "cross-entropy": spread(list(figures[arm, "cross_entropy"].values()), 3),
                "agreement %": spread(list(figures[arm, "agreement"].values()), 1),
                "gap in KL closed, %": interval(gap_closed(kl, figures[PLAIN, "kl"], figures[FULL, "kl"]), 0),
                "seeds": len(kl),
            })  # fmt: skip
    return made


def _bytes(size: Size, seed: int) -> dict[str, float]:
    """Bytes per token of each kind of target, cached beside the targets because counting reads all of them."""
    from transformers import AutoConfig

    from benchmarks.quality_runs import teacher_of

    kept = ROOT / size.name / "bytes.json"
    if not kept.exists():
        width = AutoConfig.from_pretrained(teacher_of(size)).hidden_size
        kept.write_text(json.dumps({**bytes_a_token(size, seed), "hidden": 2.0 * width}))
    return dict(json.loads(kept.read_text()))
