"""Cost of a mixture that adapts to the student: seconds per step under each policy, compared with `static`.

    make bench-mixture_cost          or  python -m benchmarks.mixture_cost [--steps N] [--layers N]

The trainer's own loop runs in this process, on two sources, with random weights and a random top-64 teacher. A step is
timed as the processor time of the training thread, which excludes waiting for targets and other load on the machine.
Each policy decides every `--steps` steps here, so that decisions are measured too: what one takes beyond ordinary steps
(sketched steps, the probe, a fit) is spread over the default interval of 1,000 steps and added to the median step.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.report import report
from benchmarks.train_cpu import ROOT as MODELS
from benchmarks.train_cpu import RandomTargets, prepare
from student_trainer import build_components, loop
from student_trainer.build import build
from student_trainer.cli.compose import compose
from student_trainer.run import Run
from student_trainer.settings.mixture import InfluenceMixture
from student_trainer.targets.open import Teacher
from teacher_proto.process.stopping import StopSignals

ROOT = Path("runs/mixture_cost")
INTERVAL = 1000  # default number of updates between decisions
WARM = 1  # warm-up intervals, not counted
POLICIES: dict[str, tuple[str, ...]] = {
    "static": (),
    "excess": ("data.mixture.policy=excess",),
    "divergence": ("data.mixture.policy=divergence",),
    "ado": ("data.mixture.policy=ado",),
    "influence": ("data.mixture.policy=influence", "data.mixture.probe=a"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="steps between decisions, at least 5")
    parser.add_argument("--decisions", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2, help="rows of 256 tokens per step")
    options = parser.parse_args()
    prepare(options.layers)
    shutil.rmtree(ROOT, ignore_errors=True)
    seconds = measure(options)
    static_s, _ = cost_of(seconds["static"], options.steps)
    rows: list[dict[str, Any]] = []
    for name, taken in seconds.items():
        ordinary_s, decision_s = cost_of(taken, options.steps)
        rows.append({
            "policy": name, "ms a step": 1e3 * ordinary_s, "against static": ordinary_s / static_s,
            "ms a decision": 1e3 * decision_s, "one in 1,000 steps": (ordinary_s + decision_s / INTERVAL) / static_s,
        })  # fmt: skip
    report(
        "mixture_cost", rows, {row["policy"]: row["one in 1,000 steps"] for row in rows},
        title=f"processor time of the training thread, {options.layers} layers of SmolLM2-135M's shape, "
        f"{256 * options.rows} tokens per step",
        notes=[f"medians of {options.steps * options.decisions} steps; the policies take turns"],
    )  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each timed step, by policy. They take turns step by step, so that all see the same machine load."""
    steps = options.steps * options.decisions
    seconds: dict[str, list[float]] = {name: [] for name in POLICIES}
    with ExitStack() as stack:
        runs = {name: open_run(name, options, steps, stack) for name in POLICIES}
        for number in range(WARM * options.steps + steps):
            for name, run in runs.items():
                begun = time.thread_time()
                loop.advance(run, run.settings.run.steps, time.monotonic())
                if number >= WARM * options.steps:
                    seconds[name].append(time.thread_time() - begun)
    return seconds


def open_run(name: str, options: argparse.Namespace, steps: int, stack: ExitStack) -> Run:
    """A run that is ready for its first step."""
    changes = POLICIES[name]
    if changes:
        changes = (*changes, f"data.mixture.update_interval={options.steps}", "data.mixture.lag=4")
    lines = [
        f"student.checkpoint_path={MODELS / 'student'}", "student.compute=float32", f"run.root={ROOT}",
        f"run.id={name.replace(', ', '-')}", f"run.steps={WARM * options.steps + steps}", "run.device=cpu",
        "run.threads=1", "data.seq_len=256", f"data.rows={options.rows}", "data.held_out_rows=4", "data.workers=1",
        "teacher.url=http://unused", "teacher.top_k=64", "teacher.sanity=off", "distillation=logits_only",
        "evaluation.every=0", "checkpoint.every=0", "logging.wandb=off", "logging.progress=off",
        f"data.cache_folder={MODELS / 'cache'}",
    ]  # fmt: skip
    for source in "ab":
        lines += [f"data.sources.{source}.{field}" for field in (
            "kind=jsonl", "format=tokens", f"path={MODELS / 'text.jsonl'}", "held_out_fraction=0.1")]  # fmt: skip
    targets: Any = RandomTargets()

    def open_here(settings: Any, thread: Any, stack: ExitStack, saved: Any = None) -> Teacher:
        return Teacher(thread.call(targets.open()), targets)

    real = build_components.open_teacher
    build_components.open_teacher = open_here
    try:
        return build(compose([*lines, *changes]), StopSignals(), stack)
    finally:
        build_components.open_teacher = real


def cost_of(seconds: list[float], interval: int) -> tuple[float, float]:
    """(median seconds of an ordinary step, additional seconds of a decision), from whole intervals."""
    sketched = InfluenceMixture.model_fields["sketch_steps"].default
    intervals = [seconds[start : start + interval] for start in range(0, len(seconds), interval)]
    ordinary_s = statistics.median(taken for each in intervals for taken in each[:-sketched])
    extra = [sum(taken - ordinary_s for taken in each[-sketched:]) for each in intervals]
    return ordinary_s, max(0.0, statistics.median(extra))


if __name__ == "__main__":
    main()
