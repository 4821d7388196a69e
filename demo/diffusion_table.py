"""The results of `demo.diffusion`: means over seeds with their spread, and marks where an arm differs from the base.

Tables for the terminal and in Markdown, and the page. A run's metric is the mean over its sources. An arm is marked as
better than the base if the metric of each of its seeds is better than that of each of the base's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from demo.comparison import markdown_table
from demo.diffusion_arms import THRESHOLDS, Comparison
from demo.diffusion_curve import area_under, tokens_per_pass_at
from student_trainer.reporting.json_lines import read_lines

# Metric -> (its label, decimals, whether higher is better; None: neither).
FIGURES: Mapping[str, tuple[str, int, bool | None]] = {
    "cross_entropy": ("masked cross-entropy", 3, False),
    "cross_entropy_masked_25": ("... blocks up to 25 % masked", 3, False),
    "cross_entropy_masked_100": ("... blocks over 75 % masked", 3, False),
    "kl": ("KL(teacher‖student)", 3, False),
    "agreement": ("agreement", 3, True),
    "infilled_tokens": ("tokens infilled correctly", 3, True),
    "infilled_exactly": ("spans infilled exactly", 3, True),
    **{f"written_{t:g}_tokens_per_pass": (f"tokens per pass at {t:g}", 2, True) for t in THRESHOLDS},
    **{f"written_{t:g}_perplexity": (f"perplexity at {t:g}, judged", 0, False) for t in THRESHOLDS},
    f"written_{THRESHOLDS[-1]:g}_entropy": (f"entropy at {THRESHOLDS[-1]:g}", 2, None),
    "equal": ("tokens per pass at equal perplexity", 2, True),
    "aup": ("area under the curve", 2, True),
}


@dataclass(frozen=True)
class Results:
    """The metrics of the last evaluation, by arm and by seed."""

    figures: Mapping[str, Mapping[int, Mapping[str, float]]]
    steps: int

    def of(self, arm: str, figure: str) -> list[float]:
        return [run[figure] for run in self.figures.get(arm, {}).values() if run.get(figure) is not None]

    def table(self, comparison: Comparison) -> Table:
        shown = Table(title=f"{comparison.about}: {self.steps} steps per run")
        for column in ("held out", *self.columns(comparison)):
            shown.add_column(column, justify="left" if column == "held out" else "right")
        for row in self.rows(comparison):
            shown.add_row(*row)
        return shown

    def columns(self, comparison: Comparison) -> list[str]:
        return [arm.replace("_", " ") for arm in comparison.arms if arm in self.figures]

    def rows(self, comparison: Comparison) -> list[list[str]]:
        """One row per metric: mean ± spread, with a mark if it is better or worse than the base's for all seeds."""
        rows = []
        for figure, (name, decimals, more) in FIGURES.items():
            cells = [
                _cell(self.of(arm, figure), decimals) + self._mark(comparison, arm, figure, more)
                for arm in comparison.arms if arm in self.figures
            ]  # fmt: skip
            if any(cells):
                rows.append([name, *cells])
        return rows

    def _mark(self, comparison: Comparison, arm: str, figure: str, more: bool | None) -> str:
        ours, base = self.of(arm, figure), self.of(comparison.base, figure)
        if arm == comparison.base or more is None or min(len(ours), len(base)) < 2:
            return ""
        above, below = min(ours) > max(base), max(ours) < min(base)
        if not (above or below):
            return ""
        return " +" if above == more else " −"


def results_of(runs: Path, comparison: Comparison, steps: int) -> Results:
    """The results of all finished runs."""
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for arm, seed in comparison.runs:
        lines = read_lines(runs / f"{arm}-{seed}" / "evaluation.jsonl")
        if lines and lines[-1]["step"] == steps:
            figures.setdefault(arm, {})[seed] = _means(lines[-1])
    _add_curves(figures, comparison)
    return Results(figures, steps)


def _means(line: Mapping[str, Any]) -> dict[str, float]:
    """Means over the sources, geometric ones for perplexities."""
    sources = [value for value in line.values() if isinstance(value, dict)]
    found = {}
    for name in sources[0]:
        values = [source[name] for source in sources if source.get(name) is not None]
        if values:
            geometric = name.endswith("_perplexity")
            found[name] = math.exp(mean(map(math.log, values))) if geometric else mean(values)
    return found


def _curve(run: Mapping[str, float]) -> list[tuple[float, float]]:
    return [(run[f"written_{t:g}_tokens_per_pass"], run[f"written_{t:g}_perplexity"]) for t in THRESHOLDS]


def _add_curves(figures: dict[str, dict[int, dict[str, float]]], comparison: Comparison) -> None:
    """Add the tokens per pass at the perplexity that the base has at its highest threshold, and the area under the
    judge's mean probability of a token (per cent) by tokens per pass.
    """
    if comparison.base not in figures:
        return
    wanted = f"written_{THRESHOLDS[-1]:g}_perplexity"
    equal = math.exp(mean(math.log(run[wanted]) for run in figures[comparison.base].values()))
    curves = {(arm, seed): _curve(run) for arm, seeds in figures.items() for seed, run in seeds.items()}
    best = max(100 / perplexity for curve in curves.values() for _, perplexity in curve)
    for (arm, seed), curve in curves.items():
        reached = tokens_per_pass_at(curve, equal)
        if reached is not None:
            figures[arm][seed]["equal"] = reached
        figures[arm][seed]["aup"] = area_under([(rate, 100 / perplexity) for rate, perplexity in curve], best)


def _cell(values: Sequence[float], decimals: int) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{decimals}f}"
    return f"{mean(values):.{decimals}f} ± {stdev(values):.{decimals}f}"


def write_results(runs: Path, comparison: Comparison, plan: Mapping[str, Any]) -> None:
    """Write `summary.json`, `table.md` and the page, of finished runs."""
    from student_trainer.reporting.report import RunRecord, write_report

    results = results_of(runs, comparison, plan["steps"])
    summary = {
        "about": comparison.about, "plan": plan,
        "arms": {name: arm.about for name, arm in comparison.arms.items()}, "figures": results.figures,
    }  # fmt: skip
    (runs / "summary.json").write_text(json.dumps(summary, indent=2))
    (runs / "table.md").write_text(markdown(results, comparison))
    done = [runs / f"{arm}-{seed}" for arm, seed in comparison.runs if seed in results.figures.get(arm, {})]
    if not done:
        return
    machine = plan["machine"]
    write_report(
        [RunRecord.read(run) for run in done], runs / "report.html", title="Stillhouse: a block-diffusion student",
        lead=f"{comparison.about}. "
        + "; ".join(f"{name.replace('_', ' ')}: {arm.about}" for name, arm in comparison.arms.items()) + ".",
        facts=[
            ("machine", machine["cpu"]),
            ("steps", f"{plan['steps']} per run, of {comparison.rows * comparison.seq_len} tokens each"),
            *((row[0], ", ".join(f"{column} {cell}" for column, cell in
                                 zip(results.columns(comparison), row[1:], strict=True)))
              for row in results.rows(comparison)),
        ],
    )  # fmt: skip


def markdown(results: Results, comparison: Comparison) -> str:
    """One line per arm if there are many, otherwise one per metric."""
    table = [["held out", *results.columns(comparison)], *results.rows(comparison)]
    if len(table[0]) > 4:
        table = [list(line) for line in zip(*table, strict=True)]
    return markdown_table(table) + "\n"
