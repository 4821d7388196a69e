"""BitDistill end to end: SmolLM2-135M made ternary, and taught by the model that it was made of.

    make bitdistill      or, installed:  python -m demo.bitdistill [--minutes N]

Serves the teacher and an attention service beside it, measures this machine and, in the time available, trains the
ternary student on text alone (stage 2) and then two arms of equal steps from there (text alone; stage 3 with the
teacher's logits and attention relations). Exports the distilled student in three formats, and writes
`runs/bitdistill/summary.json` and `runs/bitdistill/report.html`.
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

from rich.table import Table

from demo.arms import run_arms
from demo.measure import Machine, StudentProcess
from demo.page import figures_table
from demo.plan import MARGIN, Plan, Work, describe, make_plan
from demo.prepare import TEACHER
from demo.processes import Processes, prepared, stoppable, train
from demo.screen import Screen
from demo.served import NAME, TOP_K, Teacher, ends, measure_machine, serve_teacher
from demo.verdict import Verdict, sentences, verdict_on

RUNS = Path("runs/bitdistill")
SEQ_LEN = 512
FORMATS = ("hf", "bitnet", "gguf")
STAGE2, PLAIN, DISTILLED = "stage2", "cross_entropy", "distilled"
ABOUT = {
    STAGE2: "the text alone, while its weights become ternary",
    PLAIN: "the text alone",
    DISTILLED: "the text, the teacher's logits and its attention relations",
}
# The attention service runs the layers up to the compared one, which costs about as much as the teacher.
WORKS = (Work(STAGE2, False), Work(PLAIN, False), Work(DISTILLED, True, attention=True))
LOSSES = {
    PLAIN: ["distillation=cross_entropy"],
    # At the paper's 1e5 the relations crowd out the other terms in so short a run: docs/guides/bitdistill.md.
    DISTILLED: ["distillation=bitdistill", "distillation.attention.coefficient=1e3"],
}
# Seconds of an export, which loads the student, writes it, and has other software reopen it and compute with it.
EXPORT_S = 25.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.bitdistill", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=13.0, help="for the whole demo (default: %(default)g)")
    options = parser.parse_args()
    with stoppable(), Processes(Screen()) as processes:
        return bitdistill(processes, options.minutes)


def bitdistill(processes: Processes, minutes: float) -> int:
    screen, started = processes.screen, time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
    prepared(processes, "teacher", "text")
    with serve_teacher(processes, RUNS) as ready:
        student = StudentProcess(processes, measured_run(), RUNS / "unused.jsonl", RUNS / "student_speed.log")
        teacher = ready()
        beside = [str(TEACHER), "--name", NAME, "--max-model-len", "1024", "--teacher-url", teacher.url]
        with processes.serve("stillhouse-attention", beside, RUNS / "attention.log") as attention_ready:
            attention_url = attention_ready()
            machine = measure_machine(processes, teacher, student)
            student.close()
            exports_s = len(FORMATS) * MARGIN * (machine.start_s + EXPORT_S)
            before_s = time.monotonic() - started
            left_s = 60 * minutes - before_s - exports_s
            plan = make_plan(machine, left_s, WORKS, SEQ_LEN, required=len(WORKS))
            screen.say(describe(plan, left_s, before_s))
            screen.say(f"then {len(FORMATS)} exports in about {exports_s:.0f} s")
            deadline = time.monotonic() + max(left_s, plan.seconds)
            settings = partial(arm_settings, teacher, attention_url)
            steps = run_arms(processes, RUNS, plan, machine, deadline, len(WORKS), settings, ABOUT)
    exported = export(processes)
    summary = summarise(teacher, machine, plan, steps, exported)
    verdict = verdict_on(RUNS / PLAIN, RUNS / DISTILLED, summary["arms"], steps[PLAIN] == steps[DISTILLED])
    summary |= {"verdict": verdict.as_json(), "seconds": round(time.monotonic() - started, 1)}
    (RUNS / "summary.json").write_text(json.dumps(summary, indent=2))
    write_page(summary)
    tell(screen, summary, verdict)
    return 0


def common() -> list[str]:
    """The settings that all runs share."""
    return [
        "--config-folder", "demo/config", "data=stdlib", f"data.seq_len={SEQ_LEN}", f"run.root={RUNS}",
        "run.resume=never", "optim.weight_decay=0.01", "optim.schedule.kind=constant", "optim.schedule.warmup_steps=5",
        "checkpoint.every=0", "logging.wandb=off",
    ]  # fmt: skip


def measured_run() -> list[str]:
    """Settings of the run whose first steps are timed: stage 2, without a teacher to evaluate with."""
    return [
        *common(), "recipe=bitnet_pretraining", "optim=adamw", "teacher=none", "run.id=measured",
        f"student.checkpoint_path={TEACHER}",
        "data.held_out_rows=1", "evaluation.every=1", "evaluation.samples=0", "logging.progress=off",
    ]  # fmt: skip


def arm_settings(teacher: Teacher, attention_url: str, plan: Plan, index: int) -> list[str]:
    """Settings of stage 2, or of one of the two arms that start where it ended and differ only in the loss."""
    name = plan.names[index]
    settings = [
        *common(), f"run.id={name}", f"run.steps={plan.steps}", f"data.held_out_rows={plan.held_out_rows}",
        f"evaluation.every={plan.evaluate_every}",
        # Both later arms start from the student that stage 2 evaluated last.
        f"evaluation.at_start={str(index == 0).lower()}",
        f"teacher.url={teacher.url}", f"teacher.top_k={TOP_K}",
    ]  # fmt: skip
    if name == STAGE2:
        # The teacher is only for evaluation: held-out KL and agreement are measured in stage 2 too.
        return [
            *settings, "recipe=bitnet_pretraining", "optim=adamw", "teacher=remote", "run.seed=0",
            "optim.learning_rate=1e-3", f"student.checkpoint_path={TEACHER}",
            f"student.quantisation.warmup_steps={plan.steps // 2}",
        ]  # fmt: skip
    # Adam's first steps have full size whatever the gradient; at stage 2's rate they undo what it learnt.
    settings += [
        "recipe=bitdistill", "optim=adamw", "run.seed=1", "optim.learning_rate=3e-4",
        f"student.checkpoint_path={RUNS / STAGE2}", *LOSSES[name],
    ]  # fmt: skip
    return [*settings, f"teacher.attention_url={attention_url}"] if name == DISTILLED else settings


def export(processes: Processes) -> dict[str, dict[str, Any]]:
    """Export in each format. The command reopens it with that format's software and fails if it is not the student."""
    processes.screen.title("export")
    exported = {}
    for form in FORMATS:
        out = RUNS / DISTILLED / "exports" / form
        arguments = ["export", str(RUNS / DISTILLED), "--format", form, "--name", "SmolLM2-135M-1.58bit"]
        train(processes, f"export {form}", arguments)
        exported[form] = json.loads((out / "export.json").read_text())
    return exported


def summarise(
    teacher: Teacher, machine: Machine, plan: Plan, steps: dict[str, int], exported: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    arms = {STAGE2: ends(RUNS / STAGE2)}
    for arm in (PLAIN, DISTILLED):
        arms[arm] = {"before": arms[STAGE2]["after"], "after": ends(RUNS / arm)["after"]}
    for name, made in steps.items():
        arms[name] |= {"steps": made, "loss": ABOUT[name]}
    return {
        "seconds": 0.0, "teacher": teacher.as_json(), "machine": {**asdict(machine), "plan": plan.as_json()},
        "arms": arms, "exports": exported,
    }  # fmt: skip


def tell(screen: Screen, summary: dict[str, Any], verdict: Verdict) -> None:
    arms = summary["arms"]
    rows = {
        # Quantisation starts at zero and is warmed up.
        "SubLN added": arms[STAGE2]["before"],
        "after stage 2": arms[STAGE2]["after"],
        "text alone": arms[PLAIN]["after"],
        "distilled": arms[DISTILLED]["after"],
    }
    screen.say(figures_table("Held-out text: the ternary student, in nats per token", rows))
    screen.say(sentences(verdict))
    screen.say(exports_table(summary["exports"]))
    screen.say(f"report: {RUNS / 'report.html'}   {summary['seconds']:.0f} s in total")


def exports_table(exported: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="Exports of the distilled student, loaded again")
    for column in ("format", "MiB", "loaded by", "KL to the student", "top-1 agreement"):
        shown.add_column(column, justify="left" if column in ("format", "loaded by") else "right")
    for form, one in exported.items():
        compared = one["comparison"]
        figures = ("tensors equal", "tensors equal") if compared is None else (
            f"{compared['kl']:.2g}", f"{compared['agreement']:.1%}")  # fmt: skip
        shown.add_row(form, f"{one['num_bytes'] / 2**20:,.0f}", one["reader"], *figures)
    return shown


def write_page(summary: dict[str, Any]) -> None:
    from student_trainer.reporting.report import RunRecord, write_report

    identity, arms = summary["teacher"]["semantic"], summary["arms"]
    write_report(
        [RunRecord.read(RUNS / arm, arm.replace("_", " ")) for arm in arms],
        RUNS / "report.html",
        title="Stillhouse BitDistill: a 1.58-bit SmolLM2-135M",
        lead="Every linear layer of the teacher is made ternary and trained on text alone (stage 2). Training then "
        "continues for equal steps on the same text, once without a teacher and once with its logits and attention "
        "relations (stage 3).",
        facts=[
            ("teacher", f"{identity['model']}, {identity['dtype']}, fingerprint {summary['teacher']['fingerprint']}"),
            ("machine", f"{summary['machine']['cpu']}, {summary['machine']['cores']} cores"),
            ("steps", ", ".join(f"{arm['steps']} {name.replace('_', ' ')}" for name, arm in arms.items())
             + f", of {SEQ_LEN} tokens each"),
            *((f"export {form}", f"{one['num_bytes'] / 2**20:,.0f} MiB") for form, one in summary["exports"].items()),
            ("time", f"{summary['seconds']:.0f} s in total"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
