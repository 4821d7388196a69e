"""Block diffusion: SmolLM2-135M without six of its layers, made a block-diffusion student, with and without a teacher.

    make diffusion                          or, installed:  python -m demo.diffusion [--minutes N]
    make diffusion ARGS=--ablations         other design choices, on a small model that is trained first

Serves the teacher, measures this machine and, in the time available, trains with cross-entropy on masked tokens, with
and without target concrete scores, at equal steps, with three seeds each. Finished runs are kept: when started again it
continues where it was stopped, with the steps first planned; --again starts over. After every run, `summary.json`,
`table.md` and `report.html` under `runs/diffusion` are rewritten.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo.comparison import finished, keep_plan, kept_plan, options_of, progress_of
from demo.diffusion_arms import ABLATIONS, MAIN, THRESHOLDS, Comparison
from demo.diffusion_table import results_of, write_results
from demo.measure import Machine, StudentProcess
from demo.plan import END_S, MARGIN, PAGE_S
from demo.processes import Processes, prepared, stoppable, train
from demo.screen import Screen
from demo.served import TOP_K, Teacher, measure_machine, serve_teacher
from student_trainer.reporting.json_lines import read_lines

RUNS = Path("runs/diffusion")
FEWEST_STEPS = 4
SMALL_STEPS, SMALL_ROWS = 400, 16  # training of the small teacher
BLOCK = 16


@dataclass(frozen=True)
class Plan:
    """What was decided when the comparison began: the same for every run of it."""

    steps: int
    machine: dict[str, Any]
    teacher: dict[str, Any]


def main() -> int:
    parser = options_of("diffusion", str(__doc__), minutes=40)
    parser.add_argument("--ablations", action="store_true", help="compare other design choices, on a small model")
    options = parser.parse_args()
    with stoppable(), Processes(Screen()) as processes:
        return compare(processes, ABLATIONS if options.ablations else MAIN, options)


def compare(processes: Processes, comparison: Comparison, options: argparse.Namespace) -> int:
    screen, started = processes.screen, time.monotonic()
    runs = RUNS / comparison.name
    if options.again:
        shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True, exist_ok=True)
    prepared(processes, *comparison.prepared)
    wanted = [(arm, seed) for arm, seed in comparison.runs if seed < options.seeds]
    with the_teacher(processes, runs, comparison) as ready:
        teacher = ready()
        left_s = 60 * options.minutes - (time.monotonic() - started)
        plan = planned(processes, comparison, teacher, left_s, len(wanted), options.steps)
        missing = [each for each in wanted if not finished(runs / "{}-{}".format(*each), plan.steps)]
        for arm, seed in missing[: options.runs]:
            run = runs / f"{arm}-{seed}"
            screen.title(f"{arm.replace('_', ' ')}, seed {seed}: {plan.steps} steps")
            screen.say(f"learns from {comparison.arms[arm].about}", style="dim")
            settings = run_settings(comparison, runs, teacher, plan, arm, seed)
            train(processes, run.name, settings, progress_of(run, plan.steps))
            if (arm, seed) != KEPT:
                # What is compared has been saved; the checkpoints are large.
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
            write_results(runs, comparison, asdict(plan))
    write_results(runs, comparison, asdict(plan))
    screen.say(results_of(runs, comparison, plan.steps).table(comparison))
    took_s = time.monotonic() - started
    screen.say(f"table: {runs / 'table.md'}   page: {runs / 'report.html'}   {took_s:.0f} s this time")
    screen.say(f"generate text: .venv/bin/stillhouse-train generate {runs / '{}-{}'.format(*KEPT)} --prompt 'The '")
    return 0


KEPT = ("tcs", 0)


@dataclass(frozen=True)
class Local:
    """The small teacher, loaded in the process of each run."""

    model: Path

    def as_json(self) -> dict[str, Any]:
        return {"model": str(self.model)}


@contextmanager
def the_teacher(processes: Processes, runs: Path, comparison: Comparison) -> Iterator[Callable[[], Teacher | Local]]:
    if comparison.served:
        with serve_teacher(processes, runs) as ready:
            yield ready
        return
    yield lambda: small_teacher(processes, runs, comparison)


def small_teacher(processes: Processes, runs: Path, comparison: Comparison) -> Local:
    """The small model, trained autoregressively on the text and exported, unless that has been done."""
    model = runs / "teacher_model"
    if not model.is_dir():
        processes.screen.title(f"training the small teacher: {SMALL_STEPS} steps")
        settings = small_teacher_settings(comparison, runs)
        train(processes, "teacher", settings, lambda: f"step {len(read_lines(runs / 'teacher' / 'metrics.jsonl'))}")
        train(processes, "export", ["export", str(runs / "teacher"), "--format", "hf", "--out", str(model)])
    return Local(model)


def small_teacher_settings(comparison: Comparison, runs: Path) -> list[str]:
    return [
        *comparison.settings, f"run.root={runs}", "run.id=teacher", f"run.steps={SMALL_STEPS}", "teacher=none",
        f"student.checkpoint_path={comparison.student}", "distillation=cross_entropy", "optim.learning_rate=3e-3",
        f"data.seq_len={comparison.seq_len}", f"data.rows={SMALL_ROWS}", f"evaluation.every={SMALL_STEPS}",
        "checkpoint.every=0", "logging.wandb=off",
    ]  # fmt: skip


def planned(
    processes: Processes, comparison: Comparison, teacher: Teacher | Local, seconds: float, runs: int, steps: int | None
) -> Plan:
    """The existing plan, or one with the given steps, or one for the machine as it is measured now."""
    from teacher_proto.hardware import cpu_name

    file = RUNS / comparison.name / "plan.json"
    if (kept := kept_plan(file)) is not None:
        plan = Plan(**kept)
        processes.screen.say(f"continuing the existing plan: {plan.steps} steps per run")
        return plan
    machine: dict[str, Any] = {"cpu": cpu_name()}
    steps = steps or comparison.steps
    if steps is None:
        assert isinstance(teacher, Teacher)
        measured = measure(processes, comparison, teacher)
        machine, steps = asdict(measured), steps_in(comparison, measured, seconds, runs)
    plan = Plan(steps, machine, teacher.as_json())
    keep_plan(file, asdict(plan))
    processes.screen.say(f"The plan: {runs} runs of {steps} steps of {comparison.rows * comparison.seq_len} tokens")
    return plan


def measure(processes: Processes, comparison: Comparison, teacher: Teacher) -> Machine:
    folder = RUNS / comparison.name
    settings = [
        *common(comparison, folder), "teacher=none", "distillation=cross_entropy", "run.id=measured",
        "run.resume=never", "data.held_out_rows=2", "evaluation.every=1", "evaluation.samples=0",
        "evaluation.infilled=0", "logging.progress=off",
    ]  # fmt: skip
    student = StudentProcess(processes, settings, folder / "unused.jsonl", folder / "student_speed.log")
    machine = measure_machine(processes, teacher, student)
    student.close()
    return machine


def steps_in(comparison: Comparison, machine: Machine, seconds: float, runs: int) -> int:
    """Steps of each run, so that all finish in `seconds`; at least a few, even if they don't."""
    # Evaluation, like training, processes each token four times: two views of two halves. Generated text is processed
    # once per pass, block by block, and at worst a pass gives one token.
    written = 2 * len(THRESHOLDS) * comparison.judged * comparison.new_tokens * BLOCK / 4
    held_out = 2 * comparison.held_out_rows * comparison.seq_len
    evaluating = (held_out + written) / machine.evaluation_tokens_per_second
    fixed_s = MARGIN * (machine.start_s + evaluating) + END_S
    asked_s = held_out / machine.teacher_tokens_per_second + PAGE_S
    asking = sum(2 * arm.asks / arm.views for arm in comparison.arms.values()) / len(comparison.arms)
    tokens = comparison.rows * comparison.seq_len
    a_step_s = MARGIN * (
        tokens / machine.student_tokens_per_second + asking * tokens / machine.teacher_tokens_per_second
    )
    return max(FEWEST_STEPS, int((seconds - asked_s - runs * fixed_s) / (runs * a_step_s)))


def common(comparison: Comparison, runs: Path) -> list[str]:
    """The settings that all runs share."""
    return [
        *comparison.settings, f"data.seq_len={comparison.seq_len}", f"run.root={runs}", "student=diffusion",
        f"student.checkpoint_path={comparison.student if comparison.served else runs / 'teacher_model'}",
        f"optim.learning_rate={comparison.learning_rate}", "optim.weight_decay=0.01", "optim.schedule.kind=constant",
        "optim.schedule.warmup_steps=5", "logging.wandb=off",
    ]  # fmt: skip


def run_settings(
    comparison: Comparison, runs: Path, teacher: Teacher | Local, plan: Plan, arm: str, seed: int
) -> list[str]:
    """Settings of one run, its arm's last. An arm of one view reads twice the rows, so that its steps cost the same."""
    chosen = comparison.arms[arm]
    rows = comparison.rows * 2 // chosen.views
    whose = (
        ["teacher.kind=remote", f"teacher.url={teacher.url}"] if isinstance(teacher, Teacher)
        else ["teacher.kind=local", f"teacher.model={teacher.model}", "teacher.dtype=float32"]
    )  # fmt: skip
    return [
        *common(comparison, runs), *whose, f"run.id={arm}-{seed}", f"run.seed={seed}", f"run.steps={plan.steps}",
        f"data.rows={rows}", f"data.held_out_rows={comparison.held_out_rows}", f"teacher.top_k={TOP_K}",
        f"evaluation.top_k={TOP_K}", f"evaluation.every={plan.steps}", "evaluation.at_start=false",
        f"evaluation.thresholds=[{','.join(map(str, THRESHOLDS))}]", f"evaluation.judged={comparison.judged}",
        f"evaluation.sample_tokens={comparison.new_tokens}", f"evaluation.infilled={comparison.infilled}",
        # So that a stopped run can resume from its middle.
        f"checkpoint.every={-(-plan.steps // 2)}", "checkpoint.keep=1", *chosen.settings,
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
