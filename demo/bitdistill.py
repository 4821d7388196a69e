"""BitDistill end to end: SmolLM2-135M made ternary, and taught by the model that it was made of.

    make bitdistill      or, installed:  python -m demo.bitdistill [--pretraining-steps N] [--steps N]

Serves the teacher and the attention service beside it, trains the ternary student on text alone (stage 2), goes on from
there in two arms of equal steps (text alone; stage 3 with the teacher's logits and attention relations), exports the
distilled student in three formats, and writes `runs/bitdistill/summary.json` and `runs/bitdistill/report.html`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.prepare import TEACHER
from demo.processes import prepare_with_progress, serve, trainer
from demo.run import NAME, Teacher, ends, figures_table, serve_teacher, verdict

RUNS = Path("runs/bitdistill")
FORMATS = ("hf", "bitnet", "gguf")
PLAIN, DISTILLED = "cross_entropy", "distilled"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.bitdistill", description=__doc__.split("\n")[0])
    parser.add_argument("--pretraining-steps", type=int, default=30, help="stage 2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of each arm of stage 3 (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    console = Console()
    started = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
    prepare_with_progress(console)
    with ExitStack() as stack:
        teacher = stack.enter_context(serve_teacher(console, RUNS))
        beside = [str(TEACHER), "--name", NAME, "--max-model-len", "1024", "--beside", teacher.url]
        attention_url = stack.enter_context(serve(console, "stillhouse-attention", beside, RUNS / "attention.log"))
        console.print(f"attention service ready at {attention_url}")
        train(console, teacher, attention_url, options.pretraining_steps, options.steps)
    exported = export(console)
    summary = summarise(teacher, exported, time.monotonic() - started)
    (RUNS / "summary.json").write_text(json.dumps(summary, indent=2))
    write_page(summary, options.pretraining_steps, options.steps)
    console.print(table(summary))
    console.print(verdict(summary))
    console.print(exports_table(exported))
    console.print(f"report: {RUNS / 'report.html'}   {summary['seconds']:.0f} s in all")
    return 0


def train(console: Console, teacher: Teacher, attention_url: str, pretraining_steps: int, steps: int) -> None:
    """Stage 2, and the two arms that begin where it ended and differ in the loss alone."""
    common = [
        "--config-folder", "demo/config", "data=stdlib", f"run.root={RUNS}", "run.resume=never",
        "student.compute=bfloat16", "optim.weight_decay=0.01", "optim.schedule.warmup_steps=5", "checkpoint.every=0",
        "logging.wandb=off",
    ]  # fmt: skip
    asked = [f"teacher.url={teacher.url}", "teacher.top_k=64"]
    console.rule(f"[bold]stage 2[/]: {pretraining_steps} steps on text alone")
    # With the teacher at hand, held-out KL and agreement are measured in stage 2 too.
    trainer(
        *common, "recipe=bitnet_pretraining", "teacher=remote", *asked, "run.id=stage2", "run.seed=0",
        "optim.learning_rate=1e-3",
        f"run.steps={pretraining_steps}", f"student.checkpoint_path={TEACHER}",
        f"student.bitnet.warmup_steps={pretraining_steps // 2}", f"evaluation.every={pretraining_steps}",
    )  # fmt: skip
    stage3 = [*common, *asked, f"run.steps={steps}", f"student.checkpoint_path={RUNS / 'stage2'}"]
    # Adam's first steps are of the full rate whatever the gradient; at stage 2's they undo what it learnt.
    stage3 += [f"evaluation.every={max(1, steps // 2)}", "recipe=bitdistill", "run.seed=1", "optim.learning_rate=3e-4"]
    for arm, loss in {
        PLAIN: ["distillation=cross_entropy"],
        # At the paper's 1e5 the relations leave a run as short as this nothing for the rest: docs/guides/bitdistill.md.
        DISTILLED: [
            "distillation=bitdistill",
            "distillation.attention.coefficient=1e3",
            f"teacher.attention_url={attention_url}",
        ],
    }.items():
        console.rule(f"[bold]stage 3, {arm.replace('_', ' ')}[/]: {steps} steps")
        trainer(*stage3, *loss, f"run.id={arm}")


def export(console: Console) -> dict[str, dict[str, Any]]:
    """Each format, opened again by its own software; the command fails where that is not the student."""
    console.rule("[bold]export[/]")
    exported = {}
    for form in FORMATS:
        out = RUNS / DISTILLED / "exports" / form
        trainer("export", str(RUNS / DISTILLED), "--format", form, "--name", "SmolLM2-135M-1.58bit")
        exported[form] = json.loads((out / "export.json").read_text())
    return exported


def summarise(teacher: Teacher, exported: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    identity = {**teacher.about["identity"], "fingerprint": teacher.about["fingerprint"]}
    arms = {arm: ends(RUNS / arm) for arm in ("stage2", PLAIN, DISTILLED)}
    return {"seconds": round(seconds, 1), "teacher": identity, "arms": arms, "exports": exported}


def table(summary: dict[str, Any]) -> Table:
    arms = summary["arms"]
    rows = {
        # The warm-up begins at no quantisation at all.
        "SubLN added, not yet ternary": arms["stage2"]["before"],
        "after stage 2": arms[DISTILLED]["before"],
        "text alone": arms[PLAIN]["after"],
        "distilled": arms[DISTILLED]["after"],
    }
    return figures_table("Held-out text: the ternary student, in nats a token", rows)


def exports_table(exported: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="The distilled student, opened again")
    for column in ("format", "MiB", "by", "KL to the student", "same first choice"):
        shown.add_column(column, justify="left" if column in ("format", "by") else "right")
    for form, one in exported.items():
        compared = one["comparison"]
        figures = ("every tensor", "every tensor") if compared is None else (
            f"{compared['kl']:.2g}", f"{compared['agreement']:.1%}")  # fmt: skip
        shown.add_row(form, f"{one['num_bytes'] / 2**20:,.0f}", one["reader"], *figures)
    return shown


def write_page(summary: dict[str, Any], pretraining_steps: int, steps: int) -> None:
    from student_trainer.report import RunRecord, write_report

    identity = summary["teacher"]["semantic"]
    write_report(
        [RunRecord.read(RUNS / arm, arm.replace("_", " ")) for arm in ("stage2", PLAIN, DISTILLED)],
        RUNS / "report.html",
        title="Stillhouse BitDistill: a 1.58-bit SmolLM2-135M",
        lead="Every linear layer of the teacher made ternary, trained on text alone (stage 2), then for the same "
        "steps on the same text: once without a teacher, once with its logits and attention relations (stage 3).",
        facts=[
            ("teacher", f"{identity['model']}, {identity['dtype']}, fingerprint {summary['teacher']['fingerprint']}"),
            ("steps", f"{pretraining_steps} of stage 2, {steps} of each arm of stage 3, of 512 tokens"),
            *((f"export {form}", f"{one['num_bytes'] / 2**20:,.0f} MiB") for form, one in summary["exports"].items()),
            ("time", f"{summary['seconds']:.0f} s in all"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
