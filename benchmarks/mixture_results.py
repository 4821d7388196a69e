"""The finished runs of `mixture`: their lines, the best mixture of the search, the tables of docs/mixtures.md."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.mixture_data import DOMAINS
from benchmarks.report import publish, report
from demo.comparison import markdown
from student_trainer.reporting.json_lines import read_lines

RESULTS = Path(__file__).parent / "results" / "mixture.jsonl"
DOCS = Path(__file__).parent.parent / "docs" / "mixtures.md"
SEEDS, SEARCH_SEED = range(5), 100
# What the student should be good at in the end: one domain, or all equally.
PROBES: dict[str, tuple[str, ...]] = {"movies": ("movies",), "all": DOMAINS}


def read_run(folder: Path) -> dict[str, Any]:
    """Held-out metrics by split and domain, and each source's share of the tokens."""
    *_, last = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    figures: dict[str, Any] = {"test": {}, "probe": {}}
    for name, values in last.items():
        split, _, domain = name.partition("_")
        if split in figures and domain in DOMAINS:
            figures[split][domain] = {each: round(values[each], 5) for each in ("cross_entropy", "kl")}
    tokens: dict[str, float] = {}
    for line in (json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if found := re.fullmatch(r"source/(\w+)/tokens", name):
                tokens[found[1]] = tokens.get(found[1], 0) + value
    return figures | {"shares": {name: round(count / sum(tokens.values()), 4) for name, count in tokens.items()}}


def results() -> list[dict[str, Any]]:
    return read_lines(RESULTS)


def mean_of(line: Mapping[str, Any], split: str, probe: str, figure: str) -> float:
    return statistics.mean(line[split][domain][figure] for domain in PROBES[probe])


def best_fixed(probe: str) -> str:
    """The mixture with the lowest KL on the probe in the search; before the search, equal shares."""
    found = {line["arm"].removeprefix("fixed: "): line for line in results() if line["seed"] == SEARCH_SEED}
    return min(found, key=lambda name: mean_of(found[name], "probe", probe, "kl"), default="equal")


def tables(docs: bool) -> None:
    blocks = []
    for probe in PROBES:
        rows = table(probe)
        title = f"test set of {'all domains, weighted equally' if probe == 'all' else probe}"
        note = "mean ± standard deviation over seeds; differences are taken seed by seed, ± their standard error"
        report("mixture" if probe == "all" else f"mixture_{probe}", rows, title=title, notes=(note,))
        blocks.append(f"{title}:\n\n{markdown(rows)}")
    if docs:
        publish(DOCS, "\n\n".join(blocks))


def table(probe: str) -> list[dict[str, Any]]:
    """One row per arm, the best KL first. Arms for the other probe are left out."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for line in results():
        if line["seed"] in SEEDS and not re.search(rf": ({'|'.join(set(PROBES) - {probe})})$", line["arm"]):
            by_arm.setdefault(line["arm"], {})[line["seed"]] = line
    base = by_arm["fixed: equal"]
    rows: list[tuple[float, dict[str, Any]]] = []
    for arm, lines in by_arm.items():
        kls = [mean_of(line, "test", probe, "kl") for line in lines.values()]
        both = sorted(set(lines) & set(base))
        apart = [mean_of(lines[s], "test", probe, "kl") - mean_of(base[s], "test", probe, "kl") for s in both]
        row = {
            "arm": arm + (" (best fixed)" if arm == f"fixed: {best_fixed(probe)}" else ""),
            "KL": spread(kls),
            "cross-entropy": spread([mean_of(line, "test", probe, "cross_entropy") for line in lines.values()]),
            "KL less that of equal shares": error(apart),
            "seeds": len(lines),
            "largest share": largest(list(lines.values())),
        }
        rows.append((statistics.mean(kls), row))
    return [row for _, row in sorted(rows, key=lambda each: each[0])]


def largest(lines: Sequence[Mapping[str, Any]]) -> str:
    names = {name for line in lines for name in line["shares"]}
    shares = {name: statistics.mean(line["shares"].get(name, 0) for line in lines) for name in names}
    name = max(sorted(shares), key=lambda each: shares[each])
    return f"{name} {shares[name]:.0%}"


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def error(values: Sequence[float]) -> str:
    of_mean = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):+.3f} ± {of_mean:.3f}"
