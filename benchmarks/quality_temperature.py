"""The table of temperatures: what an exact normaliser is worth to the student. Made by `quality`.

Teacher and student are compared at a temperature T on the teacher's top 64. Our targets have the exact probabilities at
T; other tools have only the logprobs at T = 1, and renormalise them, scale them, or leave them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.quality_runs import Size, alone, heal, measure, student_of
from benchmarks.quality_targets import TEMPERATURES, as_others_have_it, stored
from benchmarks.seeded_results import Cell, Line, by_seed, interval, paired, spread

NAME = "temperature"
SHARE = 0.5  # of the steps in the table of losses
EXACT = "exact, with tail"
TARGETS = {
    EXACT: "the normaliser over the vocabulary",
    "renormalised on both sides": "none: given that the token is among the 64",
    "K scaled to sum to 1": "over the 64, as if there were no other token",
    "teacher left at 1": "the probabilities at 1, against the student's at T",
}


def about(size: Size) -> str:
    return f"{size.what}, {size.keep[1]} of its {size.layers} layers, {size.shortened(SHARE).tokens:,} tokens per run"


def cells(size: Size, seeds: Sequence[int]) -> list[Cell]:
    """Only the more deeply pruned student, which has more to learn."""
    at_1 = [(1.0, EXACT)]
    others = [(t, targets) for t in TEMPERATURES for targets in TARGETS]
    return [
        {"arm": targets, "temperature": t, "keep": size.keep[1], "share": SHARE, "seed": seed}
        for seed in seeds for t, targets in (*at_1, *others)
    ]  # fmt: skip


def make(size: Size, cell: Cell) -> Line:
    targets, t, seed = cell["arm"], cell["temperature"], cell["seed"]
    store = {
        "K scaled to sum to 1": lambda: as_others_have_it(size, seed, "k_sums_to_1", t),
        "teacher left at 1": lambda: as_others_have_it(size, seed, "left_at_1", t),
    }.get(targets, lambda: stored(size, seed))()
    tail = {"tail": "renormalise"} if targets == "renormalised on both sides" else {}
    # Altered targets cannot pass the checks against a teacher.
    settings = [
        "teacher=cached", f"teacher.store={store}", "teacher.sanity=off", *alone("forward_kl", temperature=t, **tail)
    ]  # fmt: skip
    return measure(size, heal(size.shortened(SHARE), student_of(size, cell["keep"]), seed, settings).model)


def rows(size: Size, lines: Sequence[Line]) -> list[dict[str, Any]]:
    made = []
    for t in (1.0, *TEMPERATURES):
        exact = by_seed([line for line in lines if (line["temperature"], line["arm"]) == (t, EXACT)], "kl")
        for targets, normaliser in TARGETS.items():
            here = [line for line in lines if (line["temperature"], line["arm"]) == (t, targets)]
            if not here:
                continue
            kl = by_seed(here, "kl")
            made.append({
                "teacher's 64 at T": targets, "normaliser": normaliser if t != 1 else "is 1", "T": f"{t:g}",
                "KL": spread(list(kl.values()), 3),
                "KL less that of the exact": "" if targets == EXACT else interval(paired(kl, exact), 3, "+"),
                "cross-entropy": spread([line["cross_entropy"] for line in here], 3),
                "agreement %": spread([line["agreement"] for line in here], 1), "seeds": len(here),
            })  # fmt: skip
    return made
