"""The results of `demo.classification`: a line per run, and the tables, verdict and page that are made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from demo.classification_plan import ARMS, LENGTH_ARM, Plan, Run, best_rate, known_runs
from demo.comparison import finished, markdown
from student_trainer.reporting.json_lines import read_lines

MOST_SEEDS = 20  # for which results are looked up
BASE, FULL, DISTILLED = "bitnet_sft", "full_precision", ("logits", "relations", "both")
BEHIND = 2.0  # points that a student may be behind full precision and still keep up with it
Line = Mapping[str, Any]


def figures_of(runs: Path, plan: Plan) -> dict[str, dict[str, float]]:
    """The last metrics of every finished run, by name."""
    done: dict[str, dict[str, float]] = {}
    while True:
        new = [run for run in known_runs(plan, done, MOST_SEEDS)
               if run.name not in done and finished(runs / run.name, run.steps)]  # fmt: skip
        if not new:
            return done
        for run in new:
            last = read_lines(runs / run.name / "evaluation.jsonl")[-1]
            done[run.name] = last.get("held_out") or next(v for v in last.values() if isinstance(v, dict))


def lines_of(runs: Path, plan: Plan) -> list[dict[str, Any]]:
    """A line for every finished run, in the order in which runs are made."""
    done = figures_of(runs, plan)
    return [_line(runs, run, done[run.name], plan) for run in known_runs(plan, done, MOST_SEEDS) if run.name in done]


def _line(runs: Path, run: Run, figures: Mapping[str, float], plan: Plan) -> dict[str, Any]:
    steps = read_lines(runs / run.name / "metrics.jsonl")
    return {
        "name": run.name, "phase": run.phase, "arm": run.arm, "seed": run.seed, "rate": run.rate, "gamma": run.gamma,
        "stage2_steps": run.stage2, "steps": run.steps, "layers": plan.layers if run.arm else 30,
        "split": "test" if run.phase == "final" else "validation", "accuracy": figures.get("accuracy"),
        "cross_entropy": figures["cross_entropy"], "examples": figures["tokens"], "tokens": steps[-1]["tokens"],
        "seconds": round(sum(step["seconds"] for step in steps), 1), "cpu": plan.machine["cpu"],
    }  # fmt: skip


def accuracies(lines: Sequence[Line], arm: str) -> list[float]:
    """Test accuracies of an arm in per cent, one per seed."""
    return [100 * line["accuracy"] for line in lines if line["phase"] == "final" and line["arm"] == arm]


def arm_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """One row per arm: what was chosen for it, and its results."""
    rows = []
    for name, arm in ARMS.items():
        chosen = [line for line in lines if line["phase"] == "final" and line["arm"] == name]
        tried = [line for line in lines if line["phase"] in ("rates", "gammas") and line["arm"] == name]
        if not tried and not chosen:
            continue
        at = chosen[0] if chosen else max(tried, key=lambda line: line["accuracy"])
        best = f"{max(100 * line['accuracy'] for line in tried):.1f}" if tried else "–"
        rows.append({
            "arm": name.replace("_", " "), "learns from": arm.about, "rate": f"{at['rate']:g}",
            "gamma": at["gamma"] or "–", "validation %": best, "test %": spread(accuracies(lines, name)),
            "seeds": str(len(chosen)),
        })  # fmt: skip
    return rows


def search_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Everything that was tried on the validation split."""
    return [
        {"tried": line["phase"], "arm": line["arm"].replace("_", " "), "rate": f"{line['rate']:g}",
         "gamma": line["gamma"] or "–", "steps of stage 2": str(line["stage2_steps"]),
         "validation %": f"{100 * line['accuracy']:.1f}", "cross-entropy": f"{line['cross_entropy']:.3f}"}
        for line in lines if line["phase"] in ("rates", "gammas", "lengths")
    ]  # fmt: skip


def length_rows(lines: Sequence[Line], plan: Plan) -> list[dict[str, str]]:
    """Accuracy by the tokens of stage 2, for the arm that lengths were tried with."""
    tokens = {line["steps"]: line["tokens"] for line in lines if line["phase"] == "stage2"}
    tried = [line for line in lines if line["phase"] == "lengths"]
    done = {line["name"]: line for line in lines}
    if tried and plan.search:  # the longest was tried with the rates
        tried.append(done[best_rate(plan, done, LENGTH_ARM).name])
    return [
        {"tokens of stage 2": f"{tokens.get(line['stage2_steps'], 0):,}",
         "validation %": f"{100 * line['accuracy']:.1f}", "cross-entropy": f"{line['cross_entropy']:.3f}"}
        for line in sorted(tried, key=lambda line: line["stage2_steps"])
    ]  # fmt: skip


def spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{values[0]:.1f}" if len(values) == 1 else f"{mean(values):.1f} ± {stdev(values):.1f}"


def verdict(lines: Sequence[Line]) -> str:
    """Whether the distilled student keeps up, in a sentence. Its arm is the one that the validation split prefers;
    without a search it is BitDistill as published, with logits and relations.
    """
    tried = [line for line in lines if line["phase"] in ("rates", "gammas") and line["arm"] in DISTILLED]
    base, full = accuracies(lines, BASE), accuracies(lines, FULL)
    arm = max(tried, key=lambda line: line["accuracy"])["arm"] if tried else DISTILLED[-1]
    why = "which the validation split prefers" if tried else "as published"
    ours = accuracies(lines, arm)
    if min(len(ours), len(base), len(full)) < 2:
        return "Too few runs have finished to tell whether the distilled student keeps up with full precision."
    gain, behind = mean(ours) - mean(base), mean(full) - mean(ours)
    pooled = math.sqrt((stdev(ours) ** 2 + stdev(base) ** 2) / 2)
    above, keeps_up = gain > 2 * pooled, behind <= BEHIND
    return (
        f"The distilled student ({arm}, {why}) differs from BitNet-SFT by {gain:+.1f} points, "
        f"{'more' if above else 'not more'} than twice the pooled spread of {pooled:.1f}, and is {behind:.1f} points "
        f"behind full precision, {'within' if keeps_up else 'not within'} the margin of {BEHIND:g}."
    )


def results_table(runs: Path, plan: Plan) -> Table:
    lines = lines_of(runs, plan)
    shown = Table(title=f"Film reviews: a student of {plan.layers} layers, {plan.steps} steps per arm",
                  caption=verdict(lines))  # fmt: skip
    rows = arm_rows(lines) or [{"arm": "no run has finished"}]
    for column in rows[0]:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*row.values())
    return shown


def write_results(runs: Path, plan: Plan) -> None:
    """Write `results.jsonl`, `table.md` and the page, of finished runs. After a search the page shows its runs."""
    lines = lines_of(runs, plan)
    (runs / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables = [rows for rows in (arm_rows(lines), length_rows(lines, plan), search_rows(lines)) if rows]
    (runs / "table.md").write_text("\n\n".join([*map(markdown, tables), verdict(lines)]) + "\n")
    write_page(runs, plan, lines)


def write_page(runs: Path, plan: Plan, lines: Sequence[Line]) -> None:
    from student_trainer.reporting.report import RunRecord, write_report

    best: dict[str, Line] = {}
    for line in lines:
        shown = line["phase"] in ("rates", "gammas") if plan.search else line["phase"] == "final" and line["seed"] == 0
        if shown and line["accuracy"] >= best.get(line["arm"], line)["accuracy"]:
            best[line["arm"]] = line
    if not best:
        return
    write_report(
        [RunRecord.read(runs / line["name"], arm.replace("_", " ")) for arm, line in best.items()],
        runs / "report.html", title="Stillhouse: a ternary student of film reviews",
        lead=lead_of(plan)
        + "; ".join(f"{name.replace('_', ' ')}: {ARMS[name].about}" for name in best) + ".",
        facts=[
            ("machine", plan.machine["cpu"]),
            ("student", f"{plan.layers} layers of SmolLM2-135M-Instruct"),
            ("steps", f"{plan.steps} in final runs, {plan.search_steps} in others, {plan.stage2_steps} in stage 2"),
            *((f"test, {row['arm']}", f"{row['test %']} % ({row['seeds']} seeds)") for row in arm_rows(lines)),
            ("verdict", verdict(lines)),
        ],
    )  # fmt: skip


def lead_of(plan: Plan) -> str:
    if plan.search:
        return "Each arm's best run on the validation split, on which learning rate and gamma were chosen. "
    return "Each arm's run with the first seed, on the test split. "
