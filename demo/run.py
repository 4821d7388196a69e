"""The demo: a small student learns from a real language model that real vLLM serves over real HTTP.

    make demo            or, installed:  python -m demo.run [--steps N]

Prepares the models, starts `stillhouse-teacher` as a process of its own, trains two students that differ in the loss
alone (cross-entropy; cross-entropy and the served top-K KL), stops the teacher, and writes `runs/demo/summary.json`
and `runs/demo/report.html`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from demo.prepare import STUDENT, TEACHER
from demo.processes import prepare_with_progress, serve, trainer

RUNS = Path("runs/demo")
NAME = "SmolLM2-135M-Instruct"

# The two arms differ in this setting alone.
ARMS = {"cross_entropy": "distillation=cross_entropy", "distilled": "distillation=logits_only"}


@dataclass(frozen=True)
class Teacher:
    url: str
    about: dict[str, Any]

    @classmethod
    def at(cls, url: str) -> Teacher:
        return cls(url, httpx.get(f"{url}/v1/teacher", timeout=30).raise_for_status().json())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each arm (default: %(default)s)")
    options = parser.parse_args()
    # A demo that is told to stop takes its teacher and its trainer along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    console = Console()
    started = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
    prepare_with_progress(console)
    with serve_teacher(console, RUNS) as teacher:
        for arm, loss in ARMS.items():
            console.rule(f"[bold]{arm.replace('_', ' ')}[/]: {options.steps} steps")
            train(arm, loss, teacher.url, options.steps)
    summary = summarise(teacher, time.monotonic() - started)
    (RUNS / "summary.json").write_text(json.dumps(summary, indent=2))
    write_page(summary, options.steps)
    console.print(table(summary))
    console.print(verdict(summary))
    console.print(
        f"report: {RUNS / 'report.html'}   figures: {RUNS / 'summary.json'}   {summary['seconds']:.0f} s in all"
    )
    return 0


@contextmanager
def serve_teacher(console: Console, runs: Path) -> Iterator[Teacher]:
    """`stillhouse-teacher` with the demo's teacher, its log among `runs`."""
    options = [str(TEACHER), "--name", NAME, "--max-model-len", "1024"]
    with serve(console, "stillhouse-teacher", options, runs / "teacher.log") as url:
        teacher = Teacher.at(url)
        console.print(f"teacher ready at {teacher.url}, fingerprint {teacher.about['fingerprint']}")
        yield teacher


def train(arm: str, loss: str, url: str, steps: int) -> None:
    """One arm."""
    trainer(
        "--config-folder", "demo/config", "data=stdlib", loss,
        f"run.root={RUNS}", f"run.id={arm}", f"run.steps={steps}", "run.seed=0", "run.resume=never",
        f"student.checkpoint_path={STUDENT}", "student.compute=bfloat16", f"teacher.url={url}", "teacher.top_k=64",
        "optim.learning_rate=2e-3", "optim.weight_decay=0.01", "optim.schedule.warmup_steps=5",
        f"evaluation.every={max(1, steps // 2)}", "checkpoint.every=0", "logging.wandb=off",
    )  # fmt: skip


def ends(run: Path) -> dict[str, Any]:
    """The first and the last evaluation of a run, by source."""
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    before, after = ({k: v for k, v in line.items() if k != "step"} for line in (lines[0], lines[-1]))
    return {"before": before, "after": after}


def summarise(teacher: Teacher, seconds: float) -> dict[str, Any]:
    arms = {arm: ends(RUNS / arm) for arm in ARMS}
    identity = {**teacher.about["identity"], "fingerprint": teacher.about["fingerprint"]}
    return {"seconds": round(seconds, 1), "teacher": identity, "arms": arms}


def table(summary: dict[str, Any]) -> Table:
    arms = summary["arms"]
    rows = {"before": arms["distilled"]["before"]} | {arm.replace("_", " "): arms[arm]["after"] for arm in ARMS}
    return figures_table("Held-out text: the student before and after, in nats a token", rows)


def figures_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """`rows`: a student's name -> its figures by source."""
    shown = Table(title=title)
    for column in ("source", "student", "cross-entropy", "KL(teacher‖student)", "agreement"):
        shown.add_column(column, justify="left" if column in ("source", "student") else "right")
    last = list(rows)[-1]
    for source in rows[last]:
        for name, by_source in rows.items():
            figures = by_source[source]
            shown.add_row(
                source, name, f"{figures['cross_entropy']:.3f}", f"{figures['kl']:.3f}", f"{figures['agreement']:.1%}",
                end_section=name == last,
            )  # fmt: skip
    return shown


def verdict(summary: dict[str, Any]) -> str:
    """What the table says, in a sentence a source, with one standard error of the agreement's difference."""
    lines = []
    for source, distilled in summary["arms"]["distilled"]["after"].items():
        plain = summary["arms"]["cross_entropy"]["after"][source]
        shares, tokens = (plain["agreement"], distilled["agreement"]), distilled["tokens"]
        error = math.sqrt(sum(share * (1 - share) / tokens for share in shares))
        lines.append(
            f"{source}: with the teacher's logits KL changes by {distilled['kl'] / plain['kl'] - 1:+.1%} and agreement "
            f"by {100 * (shares[1] - shares[0]):+.1f} ± {100 * error:.1f} points, against cross-entropy alone"
        )
    return "\n".join(lines)


def write_page(summary: dict[str, Any], steps: int) -> None:
    from student_trainer.report import RunRecord, write_report

    identity = summary["teacher"]["semantic"]
    write_report(
        [RunRecord.read(RUNS / arm, arm.replace("_", " ")) for arm in ARMS],
        RUNS / "report.html",
        title="Stillhouse demo: one student, two losses",
        lead="The same broken student (every fifth layer of its teacher) learns for the same number of steps on the "
        "same text: once from the text alone, once from the text and the served teacher's top-64 logits.",
        facts=[
            ("teacher", f"{identity['model']}, {identity['dtype']}, fingerprint {summary['teacher']['fingerprint']}"),
            (
                "engine",
                " ".join(str(summary["teacher"]["numeric"][key]) for key in ("engine", "engine_version", "device")),
            ),
            ("steps", f"{steps} of 512 tokens"),
            ("time", f"{summary['seconds']:.0f} s in all"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
