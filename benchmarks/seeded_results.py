"""Results of runs over several seeds: a file with one line per run, and the statistics that tables show.

Used by `quality`; the statistics also by `bitdistill` and `quantiser_quality`.

A run is identified by its *cell*, a few words and numbers such as {"table": "losses", "arm": "sampled-50", "seed": 0};
a run that has a line is not repeated.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from student_trainer.reporting.json_lines import read_lines

Cell = Mapping[str, Any]
Line = dict[str, Any]
# Student's t at 97.5 %, by degrees of freedom; beyond these, the normal distribution is close enough.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


class Results:
    """The lines of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self, cell: Cell) -> list[Line]:
        """Lines that agree with `cell` in every field that it names, in the order in which they were made."""
        return [line for line in read_lines(self._path) if all(line.get(name) == value for name, value in cell.items())]

    def make_missing(self, cells: Iterable[Cell], make: Callable[[Cell], Line], deadline: float) -> int:
        """Make the runs that have no line yet, one after another, starting none after `deadline` (monotonic). Returns
        how many are left.
        """
        missing = [cell for cell in cells if not self.lines(cell)]
        for number, cell in enumerate(missing):
            if time.monotonic() > deadline:
                return len(missing) - number
            began, used = time.monotonic(), time.process_time()
            figures = make(cell)
            spent = {"seconds": round(time.monotonic() - began, 1), "cpu_s": round(time.process_time() - used, 1)}
            line = {**cell, **_rounded(figures), **spent, "cpu": machine()["cpu"]}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        return 0


def _rounded(figures: Mapping[str, Any]) -> Line:
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in figures.items()}


def by_seed(lines: Iterable[Line], figure: str) -> dict[int, float]:
    return {line["seed"]: line[figure] for line in lines}


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours minus theirs, for each seed that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def gap_closed(arm: Mapping[int, float], worst: Mapping[int, float], best: Mapping[int, float]) -> list[float]:
    """Percentage of the gap from `worst` to `best` that `arm` closes, for each seed that all three have."""
    seeds = sorted(arm.keys() & worst.keys() & best.keys())
    return [100 * (worst[seed] - arm[seed]) / (worst[seed] - best[seed]) for seed in seeds]


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t; infinite for one value."""
    if len(values) < 2:
        return math.inf
    freedom = len(values) - 1
    t = T_975[freedom - 1] if freedom <= len(T_975) else 1.96
    return t * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    """The mean and its 95 % interval, as in `88 [85, 91]`."""
    if not values:
        return ""
    mean, half = statistics.mean(values), half_interval(values)
    if math.isinf(half):
        return f"{mean:{sign}.{digits}f}"
    return f"{mean:{sign}.{digits}f} [{mean - half:{sign}.{digits}f}, {mean + half:{sign}.{digits}f}]"


def spread(values: Sequence[float], digits: int) -> str:
    """The mean and, if there are several values, the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def mean(line: Mapping[str, Any], figure: str) -> float:
    """Mean of a metric over the tokens of all sources, from a line of a run's evaluation.jsonl."""
    sources = [figures for name, figures in line.items() if name != "step"]
    return float(sum(f[figure] * f["tokens"] for f in sources) / sum(f["tokens"] for f in sources))
