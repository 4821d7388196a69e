"""Film reviews: a ternary student that is to keep up with full precision, with and without the teacher it is made from.

    make classification         or, installed:  python -m demo.classification [--minutes N]
    make classification ARGS='--minutes 5 --runs 3'       in slices: each continues where the last one ended

Fine-tunes SmolLM2-135M on the classes and serves it, trains the ternary student on text (stage 2), chooses each arm's
learning rate, gamma and stage 2's length on the validation split if there is time, and trains every arm with every
seed; these final runs are compared on the test split. On a slow machine the student has fewer layers. After every run,
`results.jsonl`, `table.md` and `report.html` under `runs/classification` are rewritten.
"""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from demo import prepare
from demo.classification_plan import ARMS, FEWEST_STEPS, LAYERS, ROWS, SEQ_LEN, Plan, Run, make_plan, next_run, planned
from demo.classification_table import figures_of, results_table, write_results
from demo.comparison import finished, keep_plan, kept_plan, options_of, progress_of
from demo.measure import StudentProcess
from demo.prepare import TEACHER
from demo.processes import Processes, prepared, stoppable, train
from demo.screen import Screen
from demo.served import Teacher, measure_machine, serve_teacher
from teacher_proto.hardware import auto_dtype

RUNS = Path("runs/classification")
NAME = "SmolLM2-135M-reviews"
TOP_K = 16  # for evaluation: enough, because a fine-tuned teacher's likeliest tokens include the class words


def main() -> int:
    parser = options_of("classification", str(__doc__), minutes=120)
    parser.add_argument("--layers", type=int, choices=LAYERS, help="of the student, with --steps (default: the fewest)")
    parser.add_argument("--stage2-steps", type=int, help="with --steps (default: twice as many)")
    parser.add_argument("--teacher-steps", type=int, help="with --steps (default: as many)")
    parser.add_argument("--no-search", action="store_true", help="with --steps: each arm has the first of its rates")
    options = parser.parse_args()
    started = time.monotonic()
    if options.again:
        shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    with stoppable(), Processes(Screen()) as processes:
        prepared(processes, "teacher", "reviews")
        plan = plan_of(processes, options)
        with Services(processes) as services:
            made = 0
            while (run := next_run(plan, figures_of(RUNS, plan), options.seeds)) is not None:
                over = time.monotonic() - started > 60 * options.minutes
                if over or (options.runs is not None and made == options.runs):
                    processes.screen.say(f"next: {run.name}; run the same command again to continue")
                    break
                make_run(processes, services, plan, run)
                write_results(RUNS, plan)
                made += 1
        write_results(RUNS, plan)
        processes.screen.say(results_table(RUNS, plan))
    return 0


def plan_of(processes: Processes, options: Any) -> Plan:
    """The existing plan, or one from the options, or one for the machine as it is measured now."""
    from teacher_proto.hardware import cpu_name

    file = RUNS / "plan.json"
    if (kept := kept_plan(file)) is not None:
        plan = Plan(**kept)
        processes.screen.say(f"continuing the existing plan: {described(plan)}")
        return plan
    if options.steps is not None:
        plan = planned(options.layers or LAYERS[-1], options.steps, {"cpu": cpu_name()}, not options.no_search)
        given = {"stage2_steps": options.stage2_steps, "teacher_steps": options.teacher_steps}
        plan = Plan(**(asdict(plan) | {name: value for name, value in given.items() if value is not None}))
    else:
        plan = measured_plan(processes, options)
    keep_plan(file, asdict(plan))
    processes.screen.say(f"The plan: {described(plan)}")
    return plan


def described(plan: Plan) -> str:
    return (
        f"a student of {plan.layers} layers; {plan.steps} steps per arm, {plan.teacher_steps} for the teacher, "
        f"{plan.stage2_steps} for stage 2"
    )


def measured_plan(processes: Processes, options: Any) -> Plan:
    settings = [
        *common("measured"), "data=short_texts", f"student.checkpoint_path={TEACHER}", "teacher=none",
        "distillation=cross_entropy", "run.resume=never", "data.held_out_rows=2", f"run.steps={FEWEST_STEPS}",
        "logging.progress=off",
    ]  # fmt: skip
    with serve_teacher(processes, RUNS) as ready:
        student = StudentProcess(processes, settings, RUNS / "unused.jsonl", RUNS / "student_speed.log")
        machine = measure_machine(processes, ready(), student)
        student.close()
    return make_plan(machine, 60 * options.minutes, options.seeds, asdict(machine))


@dataclass
class Services:
    """The fine-tuned teacher and its attention service, each started when a run first needs it."""

    processes: Processes
    teacher: Teacher | None = None
    attention_url: str | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def settings(self, relates: bool) -> list[str]:
        """Settings with the services' URLs; with `relates`, the attention service's too. Starts what is not running."""
        model = teacher_model(self.processes)
        if self.teacher is None:
            # The export is in float32, as it was trained; a forward pass would take several times as long in that.
            dtype = str(auto_dtype("cpu")).removeprefix("torch.")
            ready = self._stack.enter_context(
                # The transformers engine starts in seconds, and a prompt has only thirty tokens.
                serve_teacher(self.processes, RUNS, model, NAME, "--engine", "hf", "--dtype", dtype)
            )
            self.teacher = ready()
        settings = [f"teacher.url={self.teacher.url}"]
        if relates and self.attention_url is None:
            beside = [str(model), "--name", NAME, "--max-model-len", "1024", "--teacher-url", self.teacher.url]
            served = self.processes.serve("stillhouse-attention", beside, RUNS / "attention.log")
            self.attention_url = self._stack.enter_context(served)()
        return [*settings, f"teacher.attention_url={self.attention_url}"] if relates else settings


def make_run(processes: Processes, services: Services, plan: Plan, run: Run) -> None:
    processes.screen.title(f"{run.name}: {run.steps} steps")
    settings = run_settings(plan, run)
    if run.arm and ARMS[run.arm].asks:
        settings += services.settings(ARMS[run.arm].relates)
    elif run.phase == "stage2":
        go_on(run, plan)
    if run.phase != "teacher" and plan.layers < LAYERS[0]:
        prepare.first_layers(plan.layers)
    train(processes, run.name, settings, progress_of(RUNS / run.name, run.steps))
    if run.phase not in ("teacher", "stage2"):
        # What is compared has been saved; the checkpoints are large.
        shutil.rmtree(RUNS / run.name / "checkpoints", ignore_errors=True)


def teacher_model(processes: Processes) -> Path:
    """The fine-tuned teacher's folder, exported for serving; an existing folder is complete."""
    folder = RUNS / "teacher_model"
    if not folder.exists():
        arguments = ["export", str(RUNS / "teacher"), "--format", "hf", "--out"]
        prepare.make_whole(folder, lambda unfinished: train(processes, "export", [*arguments, str(unfinished)]))
    return folder


def go_on(run: Run, plan: Plan) -> None:
    """Start a longer stage 2 from a copy of the shorter one, if that is finished."""
    shorter = [length for length in plan.lengths[1:] if length < run.steps]
    folder = RUNS / run.name
    if shorter and not folder.exists() and finished(RUNS / f"stage2-{shorter[-1]}", shorter[-1]):
        prepare.make_whole(folder, lambda unfinished: shutil.copytree(RUNS / f"stage2-{shorter[-1]}", unfinished))


def student_folder(layers: int) -> Path:
    """The student that all arms start from: the teacher before fine-tuning, or its first layers."""
    return TEACHER if layers == LAYERS[0] else prepare.first_layers_folder(layers)


def common(name: str) -> list[str]:
    """The settings that all runs share."""
    return [
        f"run.root={RUNS}", f"run.id={name}", f"data.seq_len={SEQ_LEN}", f"data.rows={ROWS}",
        "evaluation.at_start=false", "evaluation.samples=0", "checkpoint.every=0", "checkpoint.keep=1",
        "optim.weight_decay=0.01", f"student.tokenizer={TEACHER}", "logging.wandb=off",
    ]  # fmt: skip


def run_settings(plan: Plan, run: Run) -> list[str]:
    """Settings of a run, without the services' URLs. A run that is stopped saves its state and resumes from there."""
    base = TEACHER if run.phase == "teacher" else student_folder(plan.layers)
    settings = [*common(run.name), f"run.steps={run.steps}", f"run.seed={run.seed}"]
    if run.phase == "teacher":
        return [
            *settings, "recipe=classification_teacher", "data=movie_reviews", f"student.checkpoint_path={base}",
            f"data.held_out_rows={plan.held_out_rows}", f"evaluation.every={run.steps}",
        ]  # fmt: skip
    if run.phase == "stage2":
        # The rate is constant, so that a shorter stage 2 is the beginning of a longer one.
        return [
            *settings, "recipe=bitnet_pretraining", "data=short_texts", "data.held_out_rows=4",
            f"student.checkpoint_path={base}", "optim.learning_rate=1e-3", "optim.schedule.kind=constant",
            f"evaluation.every={run.steps}", f"student.quantisation.warmup_steps={max(1, plan.lengths[1] // 2)}",
            "optim.schedule.warmup_steps=5", "run.allow_changes=[run.steps,evaluation.every]",
        ]  # fmt: skip
    arm = ARMS[run.arm]
    settings += [
        *arm.settings, "data=movie_reviews", f"optim.learning_rate={run.rate:g}",
        f"student.checkpoint_path={RUNS / f'stage2-{run.stage2}' if run.stage2 else base}",
        f"optim.schedule.warmup_steps={max(1, run.steps // 10)}",
        *([f"teacher.top_k={TOP_K}"] if arm.asks else []), *of_gamma(run, arm.settings),
    ]  # fmt: skip
    if run.arm != "full_precision" and not run.stage2:
        settings.append(f"student.quantisation.warmup_steps={max(1, run.steps // 2)}")
    if run.phase == "final":
        return [
            *settings, f"evaluation.every={run.steps}", "data.sources.held_out.split=test",
            f"data.held_out_rows={plan.test_rows}",
        ]  # fmt: skip
    return [*settings, f"evaluation.every={plan.evaluate_every}", f"data.held_out_rows={plan.held_out_rows}"]


def of_gamma(run: Run, settings: tuple[str, ...]) -> list[str]:
    """How the relations are weighted against the other terms."""
    if not run.gamma:
        return []
    if run.gamma != "shares":
        return [f"distillation.gamma_attention={run.gamma}"]
    terms = "cross_entropy: 1, attention: 1"
    if "distillation=attention_only" not in settings:
        terms += ", label_kl: 1"
    return [f"distillation.balance.shares={{{terms}}}", "distillation.balance.every=10"]


if __name__ == "__main__":
    sys.exit(main())
