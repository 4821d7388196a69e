"""The table of codecs: a student trained on a target dataset in 8 bits, compared with the lossless one.

Made by `quality`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.quality_runs import Size, alone, heal, measure, student_of
from benchmarks.quality_targets import dataset
from benchmarks.seeded_results import Cell, Line, by_seed, interval, paired, spread

NAME = "codec"
SHARE = 0.5  # of the steps in the table of losses
LOSSLESS, CODECS = "lossless", ("lossless", "compact:8")
LOSSES = {
    "top-64 and tail": alone("forward_kl"),
}


def about(size: Size) -> str:
    return f"{size.what}, {size.keep[1]} of its {size.layers} layers, {size.shortened(SHARE).tokens:,} tokens per run"


def cells(size: Size, seeds: Sequence[int]) -> list[Cell]:
    return [
        {"arm": loss, "codec": codec, "keep": size.keep[1], "share": SHARE, "seed": seed}
        for seed in seeds for loss in LOSSES for codec in CODECS
    ]  # fmt: skip


def make(size: Size, cell: Cell) -> Line:
    folder = dataset(size, cell["seed"], cell["codec"])
    settings = ["teacher=cached", f"teacher.store={folder}", *LOSSES[cell["arm"]]]
    return measure(size, heal(size.shortened(SHARE), student_of(size, cell["keep"]), cell["seed"], settings).model)


def rows(size: Size, lines: Sequence[Line]) -> list[dict[str, Any]]:
    made = []
    for loss in LOSSES:
        for codec in CODECS:
            here = [line for line in lines if (line["arm"], line["codec"]) == (loss, codec)]
            exact = [line for line in lines if (line["arm"], line["codec"]) == (loss, LOSSLESS)]
            if not here:
                continue
            less = {
                f"{name} less that of lossless": ""
                if codec == LOSSLESS else interval(paired(by_seed(here, figure), by_seed(exact, figure)), 4, "+")
                for name, figure in (("KL", "kl"), ("agreement", "agreement"))
            }  # fmt: skip
            made.append({
                "loss": loss, "codec": codec, "KL": spread([line["kl"] for line in here], 4),
                "cross-entropy": spread([line["cross_entropy"] for line in here], 4),
                "agreement %": spread([line["agreement"] for line in here], 2), **less, "seeds": len(here),
            })  # fmt: skip
    return made
