"""A self-contained report page about one or more runs: metrics, curves, and a passage with every model's predictions.

    stillhouse-train report RUN [RUN ...] [--out report.html]

Reads `metrics.jsonl` and `evaluation.jsonl` in a run's folder and, if they exist, `samples.jsonl`, `classes.jsonl` and
`passage.json`. The demos call `write_report` with their arms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from student_trainer.reporting.classes import class_pictures
from student_trainer.reporting.json_lines import read_lines
from teacher_proto.process.stages import stage

# Metrics of an evaluation, with their names on the page and whether higher is better.
FIGURES = {
    "cross_entropy": ("cross-entropy", False),
    "kl": ("KL(teacher‖student)", False),
    "agreement": ("agreement", True),
    "accuracy": ("accuracy", True),  # of sources with classes
}
# Metrics of a training step that get a chart if a run has them, besides `loss/NAME` of every term.
STEP_METRICS = {
    "grad_norm": "gradient norm", "learning_rate": "learning rate", "tokens_per_second": "tokens per second",
    "wait_share": "share of time waited for targets", "on_policy/mean_length": "tokens per rollout",
    "on_policy/logprob": "mean logprob of rollout tokens", "on_policy/ended": "share of rollouts that ended",
}  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """The files of one run. `metrics`: one line per step. `evaluations`: one per evaluation. `samples`: one per sample
    text. `classes`: one per evaluation of a source with classes.
    """

    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    passage: list[dict[str, Any]] | None
    samples: list[dict[str, Any]] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> RunRecord:
        """ValueError if the folder holds no run."""
        if not (folder / "metrics.jsonl").is_file():
            raise ValueError(f"{folder} holds no metrics.jsonl: expected a run's folder")
        passage = folder / "passage.json"
        return cls(
            name=name or folder.name,
            metrics=read_lines(folder / "metrics.jsonl"),
            evaluations=read_lines(folder / "evaluation.jsonl"),
            passage=json.loads(passage.read_text()) if passage.is_file() else None,
            samples=read_lines(folder / "samples.jsonl"),
            classes=read_lines(folder / "classes.jsonl"),
        )


def write_report(
    runs: Sequence[RunRecord], out: Path, *, title: str, lead: str = "", facts: Iterable[tuple[str, str]] = (),
    others: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}), untrained: str | None = None,
) -> None:  # fmt: skip
    """Render the page of these runs to `out`. `facts`: name and value pairs for its head. `others`: by name, lines like
    those of `samples.jsonl` from models that are not runs. `untrained`: a name for the student that all runs start
    from, if it is the same one.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("student_trainer.reporting"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    passages = [{"run": run.name, "tokens": run.passage} for run in runs if run.passage]
    page = environment.get_template("report.html.jinja").render(
        title=title, lead=lead, facts=list(facts), run_names=[run.name for run in runs],
        table=_table(runs, untrained), classes=class_pictures([(run.name, run.classes) for run in runs]),
        passages=passages, samples=_samples(runs, others, untrained), mixtures=_mixtures(runs),
        data={"runs": [run.name for run in runs], "charts": _charts(runs), "passages": passages,
              "mixtures": _mixtures(runs)},
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.new")  # renamed below, so that the page is never incomplete
    fresh.write_text(page)
    fresh.replace(out)


def _table(runs: Sequence[RunRecord], untrained: str | None) -> list[dict[str, Any]]:
    """Rows with every run's first and last evaluation, by source; the best last value of each metric is marked."""
    rows: list[dict[str, Any]] = []
    for source in _sources(runs):
        last_rows = []
        for run in runs:
            points = [line for line in run.evaluations if source in line]
            ends = points[:1] + points[1:][-1:]
            made = [
                {"source": source, "run": _who(run, line, untrained), "step": line["step"], "best": frozenset()}
                | line[source]
                for line in ends
            ]
            rows += [row for row in made if row not in rows]
            last_rows += made[-1:]
        for figure, (_, more_is_better) in FIGURES.items():
            known = [row for row in last_rows if row.get(figure) is not None]
            if len(known) > 1:
                best = (max if more_is_better else min)(known, key=itemgetter(figure))
                best["best"] |= {figure}
    return rows


def _samples(
    runs: Sequence[RunRecord], others: Mapping[str, Sequence[Mapping[str, Any]]], untrained: str | None
) -> list[dict[str, Any]]:
    """For each held-out text: its beginning, its continuation, and the continuations by other models and by each run's
    student in its first and last evaluation.
    """
    texts: dict[tuple[str, str], dict[str, Any]] = {}

    def add(line: Mapping[str, Any], who: dict[str, Any]) -> None:
        text = texts.setdefault((line["source"], line["document"]), {**line, "by": []})
        if not any(by["run"] == who["run"] and by["step"] == who["step"] for by in text["by"]):
            text["by"].append({**who, "text": line["written"]})

    for name, lines in others.items():
        for line in lines:
            add(line, {"run": name, "step": None})
    for run in runs:
        steps = sorted({line["step"] for line in run.samples})
        for line in run.samples:
            if line["step"] in (steps[0], steps[-1]):
                add(line, {"run": _who(run, line, untrained), "step": line["step"]})
    return list(texts.values())


def _who(run: RunRecord, line: Mapping[str, Any], untrained: str | None) -> str:
    return untrained if untrained is not None and line["step"] == 0 else run.name


def _charts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    charts = []
    for source in _sources(runs):
        for figure, (label, _) in FIGURES.items():
            series = _series(
                [[(line["step"], line.get(source, {}).get(figure)) for line in run.evaluations] for run in runs]
            )
            charts.append({"title": f"{label}, held out, {source}", "series": series})
    terms = sorted({key for run in runs for line in run.metrics for key in line if key.startswith("loss/")})
    names = {key: f"training {key.removeprefix('loss/').replace('_', ' ')}" for key in terms} | STEP_METRICS
    for key, label in names.items():
        series = _series([[(line["step"], line.get(key)) for line in run.metrics] for run in runs])
        charts.append({"title": label, "series": series})
    return charts


def _mixtures(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """For each run with an adaptive mixture: the weights at every step where they changed, and the last decisions."""
    pictures = []
    for run in runs:
        drawn = [line for line in run.metrics if any(key.startswith("mixture/") for key in line)]
        if not drawn:
            continue
        names = [key.removeprefix("mixture/") for key in drawn[0] if key.startswith("mixture/")]
        points = [[line["step"], *(line[f"mixture/{name}"] for name in names)] for line in drawn]
        kept = [point for at, point in enumerate(points)
                if at in (0, len(points) - 1) or point[1:] != points[at - 1][1:]]  # fmt: skip
        decided = [line for line in run.metrics if any(key.startswith("decided/") for key in line)]
        pictures.append({"run": run.name, "sources": names, "points": kept, "decisions": _decisions(decided[-12:])})
    return pictures


def _decisions(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each decision: its step, the weight and reasons of each source, and its note."""
    decisions = []
    for line in lines:
        sources = [key.removeprefix("decided/") for key in line if key.startswith("decided/")]
        by_source = [
            {"source": name, "weight": line[f"decided/{name}"],
             "reasons": {key.rpartition("/")[2]: value for key, value in line.items()
                         if key.startswith(f"reason/{name}/")}}
            for name in sources
        ]  # fmt: skip
        decisions.append({"step": line["step"], "sources": by_source, "note": line.get("decided_note", "")})
    return decisions


def _series(lines: Sequence[Sequence[tuple[int, Any]]]) -> list[dict[str, Any]]:
    """One series per run that has the metric: at most 400 points [step, value]."""
    series = []
    for index, pairs in enumerate(lines):
        points = [[step, value] for step, value in pairs if isinstance(value, (int, float))]
        if points:
            series.append({"run": index, "points": points[:: -(-len(points) // 400)]})
    return series


def _sources(runs: Sequence[RunRecord]) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        for line in run.evaluations:
            names.update(dict.fromkeys(key for key, figures in line.items() if isinstance(figures, Mapping)))
    return list(names)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="stillhouse-train report", description="Make a page of one or more runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, help="where to write the page (default: report.html in the first run)")
    options = parser.parse_args(arguments)
    try:
        with stage("reading the runs"):
            runs = [RunRecord.read(folder) for folder in options.runs]
    except ValueError as error:
        print(f"stillhouse-train report: {error}", file=sys.stderr)
        return 2
    out = options.out or options.runs[0] / "report.html"
    write_report(runs, out, title=" · ".join(run.name for run in runs))
    print(out)
    return 0
