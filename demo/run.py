"""The demo: a pruned language model is healed, with and without the teacher that it was cut from.

    make demo            or, installed:  python -m demo.run [--minutes N]

Removes six of SmolLM2-135M's thirty layers, serves the whole model with `stillhouse-teacher` in its own process,
measures this machine and, in the time available, trains arms that differ only in the loss (the served top-64
distribution; the text alone; if there is time, 50 samples from the teacher per token). Writes
`runs/demo/summary.json` and `runs/demo/report.html`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from demo.arms import run_arms
from demo.measure import Machine, StudentProcess
from demo.page import figures_table, write_page
from demo.plan import Plan, Work, describe, make_plan
from demo.prepare import PRUNED, TEACHER
from demo.processes import Processes, prepared, stoppable
from demo.screen import Screen
from demo.served import TOP_K, Teacher, ends, measure_machine, serve_teacher
from demo.verdict import Verdict, sentences, verdict_on, what_it_takes

RUNS = Path("runs/demo")
SEQ_LEN = 256
SAMPLES = 50
# The arms that are compared; a third is trained if there is time.
REQUIRED = 2

PLAIN, DISTILLED, SAMPLED = "cross_entropy", "distilled", "sampled"
ABOUT = {
    DISTILLED: f"the teacher's top {TOP_K} and the rest of its distribution as one bucket",
    PLAIN: "the text alone",
    SAMPLED: f"{SAMPLES} samples per token from the teacher's distribution",
}
# The arms differ only in these settings.
LOSSES = {
    DISTILLED: ["distillation=none", "distillation.terms.top_k_kl.kind=forward_kl"],
    PLAIN: ["distillation=cross_entropy"],
    SAMPLED: ["distillation=none", "distillation.terms.sampled.kind=sampled", f"distillation.samples={SAMPLES}"],
}
WORKS = tuple(Work(name, teacher_in_steps=name != PLAIN) for name in LOSSES)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole demo (default: %(default)g)")
    options = parser.parse_args()
    with stoppable(), Processes(Screen()) as processes:
        return demo(processes, options.minutes)


def demo(processes: Processes, minutes: float) -> int:
    screen, started = processes.screen, time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
    prepared(processes, "teacher", "pruned", "text")
    with serve_teacher(processes, RUNS) as ready:
        student = StudentProcess(processes, measured_run(), RUNS / "teacher_texts.jsonl", RUNS / "student_speed.log")
        teacher = ready()
        machine = measure_machine(processes, teacher, student)
        before_s = time.monotonic() - started
        plan = make_plan(machine, 60 * minutes - before_s, WORKS, SEQ_LEN)
        screen.say(describe(plan, 60 * minutes - before_s, before_s))
        deadline = max(started + 60 * minutes, time.monotonic() + plan.seconds)
        student.write(plan.held_out_rows, TEACHER)
        settings = partial(arm_settings, teacher)
        steps = run_arms(processes, RUNS, plan, machine, deadline, REQUIRED, settings, ABOUT)
    # The healed student can be exported; the others were only for comparison, and their checkpoints are large.
    for name in set(steps) - {DISTILLED}:
        shutil.rmtree(RUNS / name / "checkpoints")
    summary = summarise(teacher, machine, plan, steps)
    verdict = verdict_on(RUNS / PLAIN, RUNS / DISTILLED, summary["arms"], steps[PLAIN] == steps[DISTILLED])
    summary["verdict"] = verdict.as_json() | {"what_it_takes": what_it_takes(verdict, plan, machine, before_s)}
    summary["seconds"] = round(time.monotonic() - started, 1)
    (RUNS / "summary.json").write_text(json.dumps(summary, indent=2))
    write_page(RUNS, summary, {name: ABOUT[name] for name in steps})
    tell(screen, summary, verdict)
    return 0


def common() -> list[str]:
    """The settings that all arms share."""
    return [
        "--config-folder", "demo/config", "data=stdlib", f"data.seq_len={SEQ_LEN}", f"run.root={RUNS}", "run.seed=0",
        "run.resume=never", f"student.checkpoint_path={PRUNED}", "optim.learning_rate=2e-4", "optim.weight_decay=0.01",
        # With a constant rate, a run that is cut short by its time limit is the beginning of a longer one.
        "optim.schedule.kind=constant", "optim.schedule.warmup_steps=3", "checkpoint.every=0", "logging.wandb=off",
    ]  # fmt: skip


def measured_run() -> list[str]:
    """Settings of the run whose first steps are timed, on text alone."""
    return [
        *common(), "teacher=none", "distillation=cross_entropy", "run.id=measured", "data.held_out_rows=1",
        "evaluation.every=1", "logging.progress=off",
    ]  # fmt: skip


def arm_settings(teacher: Teacher, plan: Plan, index: int) -> list[str]:
    name = plan.names[index]
    return [
        *common(), *LOSSES[name], f"run.id={name}", f"run.steps={plan.steps}",
        f"data.held_out_rows={plan.held_out_rows}", f"teacher.url={teacher.url}", f"teacher.top_k={TOP_K}",
        f"evaluation.every={plan.evaluate_every}",
        # All arms start from the same student, which is evaluated only once.
        f"evaluation.at_start={str(index == 0).lower()}",
    ]  # fmt: skip


def summarise(teacher: Teacher, machine: Machine, plan: Plan, steps: dict[str, int]) -> dict[str, Any]:
    arms = {
        name: {**ends(RUNS / name, before=RUNS / plan.names[0]), "steps": made, "loss": ABOUT[name]}
        for name, made in steps.items()
    }
    return {
        "seconds": 0.0,
        "teacher": teacher.as_json(),
        "machine": {**asdict(machine), "plan": plan.as_json()},
        "arms": arms,
    }


def tell(screen: Screen, summary: dict[str, Any], verdict: Verdict) -> None:
    arms = summary["arms"]
    rows = {"pruned": arms[DISTILLED]["before"]} | {name.replace("_", " "): arm["after"] for name, arm in arms.items()}
    screen.say(figures_table("Held-out text: the pruned and the healed students", rows))
    screen.say(sentences(verdict))
    screen.say(
        summary["verdict"]["what_it_takes"]
        or "The teacher helps: lower KL on both sources, higher agreement beyond chance."
    )
    screen.say(f"export the healed student: .venv/bin/stillhouse-train export {RUNS / DISTILLED} --format hf")
    screen.say(
        f"report: {RUNS / 'report.html'}   figures: {RUNS / 'summary.json'}   {summary['seconds']:.0f} s in total"
    )


if __name__ == "__main__":
    sys.exit(main())
