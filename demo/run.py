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
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo.prepare import STUDENT, TEACHER, prepare

RUNS = Path("runs/demo")
TEACHER_LOG = RUNS / "teacher.log"
BIN = Path(sys.executable).parent
READY_WITHIN_S = 240.0
# Teacher and student share the cores here: a thread that waits for another must not spin.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", **os.environ}

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
    with serve_teacher(console) as teacher:
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


def prepare_with_progress(console: Console) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("prepare", total=None)
        prepare(lambda what, done, total: progress.update(task, description=what, completed=done, total=total))


@contextmanager
def serve_teacher(console: Console) -> Iterator[Teacher]:
    """`stillhouse-teacher` on a free port, ready when entered, ended when left."""
    command = [
        str(BIN / "stillhouse-teacher"), str(TEACHER), "--name", "SmolLM2-135M-Instruct", "--port", "0",
        "--max-model-len", "1024",
    ]  # fmt: skip
    console.print(f"[dim]$ {' '.join(command)}[/]")
    with TEACHER_LOG.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    try:
        with console.status("the teacher loads its model into vLLM"):
            teacher = Teacher.at(_wait_ready(process))
        console.print(f"teacher ready at {teacher.url}, fingerprint {teacher.about['fingerprint']}")
        yield teacher
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_ready(process: subprocess.Popen[bytes]) -> str:
    """The URL that the teacher says it is ready at. SystemExit with the end of its log if it never does."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        log = TEACHER_LOG.read_text(errors="replace")
        if ready := re.search(r"^stillhouse-teacher: ready at (\S+),", log, re.MULTILINE):
            return ready[1]
        if process.poll() is not None:
            tail = "\n".join(log.splitlines()[-15:])
            raise SystemExit(f"the teacher ended with code {process.returncode}; {TEACHER_LOG} ends with:\n{tail}")
        time.sleep(0.25)
    raise SystemExit(f"the teacher was not ready within {READY_WITHIN_S:.0f} s; see {TEACHER_LOG}")


def train(arm: str, loss: str, url: str, steps: int) -> None:
    """One arm, as a user would run it."""
    command = [
        str(BIN / "stillhouse-train"), "--config-folder", "demo/config", "data=stdlib", loss,
        f"run.root={RUNS}", f"run.id={arm}", f"run.steps={steps}", "run.seed=0", "run.resume=never",
        f"student.checkpoint_path={STUDENT}", "student.compute=bfloat16", f"teacher.url={url}", "teacher.top_k=64",
        "optim.learning_rate=2e-3", "optim.weight_decay=0.01", "optim.schedule.warmup_steps=5",
        f"evaluation.every={max(1, steps // 2)}", "checkpoint.every=0", "logging.wandb=off",
    ]  # fmt: skip
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code:
        raise SystemExit(f"stillhouse-train ended with code {code} in the arm {arm}")


def summarise(teacher: Teacher, seconds: float) -> dict[str, Any]:
    arms = {}
    for arm in ARMS:
        lines = [json.loads(line) for line in (RUNS / arm / "evaluation.jsonl").read_text().splitlines()]
        before, after = ({k: v for k, v in line.items() if k != "step"} for line in (lines[0], lines[-1]))
        arms[arm] = {"before": before, "after": after}
    identity = {**teacher.about["identity"], "fingerprint": teacher.about["fingerprint"]}
    return {"seconds": round(seconds, 1), "teacher": identity, "arms": arms}


def table(summary: dict[str, Any]) -> Table:
    shown = Table(title="Held-out text: the student before and after, in nats a token")
    for column in ("source", "student", "cross-entropy", "KL(teacher‖student)", "agreement"):
        shown.add_column(column, justify="left" if column in ("source", "student") else "right")
    for source in summary["arms"]["distilled"]["after"]:
        rows = [("before", summary["arms"]["distilled"]["before"][source])]
        rows += [(arm.replace("_", " "), summary["arms"][arm]["after"][source]) for arm in ARMS]
        for name, figures in rows:
            shown.add_row(
                source, name, f"{figures['cross_entropy']:.3f}", f"{figures['kl']:.3f}", f"{figures['agreement']:.1%}",
                end_section=name == "distilled",
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
