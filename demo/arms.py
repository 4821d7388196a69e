"""Train a demo's arms one by one within a deadline, each with its share of the time left. Called by the demos."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from demo.measure import Machine
from demo.plan import PAGE_S, Plan, arm_s, slowed, step_s, time_limit_s
from demo.processes import Processes, TooLongError, train
from student_trainer.reporting.json_lines import read_lines

# How late an arm may be before it is ended, because it or its machine has gone wrong.
GRACE_S = 30.0


def run_arms(
    processes: Processes, runs: Path, plan: Plan, machine: Machine, deadline: float, required: int,
    settings: Callable[[Plan, int], list[str]], about: Mapping[str, str],
) -> dict[str, int]:  # fmt: skip
    """Train the plan's arms. Returns the number of steps that each has made. `deadline` (monotonic) includes the page.

    The first `required` arms share the remaining time in proportion to what they need, and end at their last step or
    when their time is up. If one ends early on a slower machine, those after it make the same number of steps.
    Arms beyond the required ones are left out if their steps no longer fit.
    """
    steps: dict[str, int] = {}
    for index, name in enumerate(plan.names):
        left_s = deadline - time.monotonic() - PAGE_S
        if index >= required and arm_s(plan, machine, index) > left_s:
            processes.screen.say(f"not enough time left for {name.replace('_', ' ')}: {left_s:.0f} s")
            break
        limit_s = time_limit_s(plan, machine, index, left_s, required)
        processes.screen.title(f"{name.replace('_', ' ')}: {plan.steps_in_words}")
        processes.screen.say(f"learns from {about[name]}", style="dim")
        arm = [*settings(plan, index), f"run.time_limit_s={limit_s:.1f}"]
        steps[name], seconds = _run(processes, runs / name, arm, plan.steps, deadline + GRACE_S)
        if index < required:
            plan = replace(plan, steps=steps[name])
        machine = slowed(machine, seconds / step_s(plan, machine, plan.arms[index]))
    return steps


def _run(processes: Processes, run: Path, settings: list[str], steps: int, deadline: float) -> tuple[int, float]:
    """Train one arm in its own process. Returns how many steps it has made, and their median time in seconds."""
    metrics = run / "metrics.jsonl"
    try:
        train(processes, run.name, settings, lambda: f"step {len(read_lines(metrics))} of {steps}", deadline=deadline)
    except TooLongError as error:
        raise SystemExit(f"{error}: this machine has become slower since it was measured; increase --minutes") from None
    seconds = sorted(line["seconds"] for line in read_lines(metrics))
    return len(seconds), seconds[len(seconds) // 2]
