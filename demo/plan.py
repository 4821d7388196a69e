"""What a demo does in the time available: arithmetic on measurements, without a clock. Called by the demos.

Teacher and student share the cores, so their times add up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from demo.measure import Machine

# END_S of every arm: its passage, saving, the process's end. PAGE_S of the demo: the page, and ending the teacher.
END_S, PAGE_S = 12.0, 10.0
# Plans assume that everything takes a little longer than was measured.
MARGIN = 1.12
# A third arm is worth its time if every arm still has this many steps.
THIRD_ARM_STEPS = 30
# Rows of held-out text per source: the most that fit in this share of the time, to keep the errors of metrics small.
ROWS, EVALUATION_SHARE = (24, 20, 16, 12, 8, 6, 4, 2), 0.3


@dataclass(frozen=True)
class Work:
    """What an arm's steps need. A step is one row, so that tokens per step and per row are the same."""

    name: str
    teacher_in_steps: bool
    attention: bool = False  # the attention service too, which costs about as much as the teacher


@dataclass(frozen=True)
class Plan:
    """`steps` of every arm; `held_out_rows` of each of two sources; `evaluations` of the first arm, of which the others
    make one fewer; `seconds` from the first arm to the page.
    """

    arms: tuple[Work, ...]
    steps: int
    held_out_rows: int
    seq_len: int
    evaluations: int = 2
    seconds: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(arm.name for arm in self.arms)

    @property
    def steps_in_words(self) -> str:
        return "1 step" if self.steps == 1 else f"{self.steps} steps"

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations: one at the end and, if there are three, one in the middle."""
        return self.steps if self.evaluations == 2 else -(-self.steps // 2)

    def as_json(self) -> dict[str, Any]:
        return {"arms": self.names, "steps": self.steps, "seq_len": self.seq_len,
                "held_out_tokens": self.held_out_tokens, "seconds": round(self.seconds, 1)}  # fmt: skip

    @property
    def held_out_tokens(self) -> int:
        return 2 * self.held_out_rows * self.seq_len


def step_s(plan: Plan, machine: Machine, arm: Work) -> float:
    asked = plan.seq_len * (arm.teacher_in_steps + arm.attention) / machine.teacher_tokens_per_second
    return MARGIN * (plan.seq_len / machine.student_tokens_per_second + asked)


def evaluation_s(plan: Plan, machine: Machine) -> float:
    """Seconds of one evaluation, with the few texts that the student writes, which cost about as much as two rows."""
    return MARGIN * (plan.held_out_tokens + 2 * plan.seq_len) / machine.evaluation_tokens_per_second


def arm_s(plan: Plan, machine: Machine, index: int) -> float:
    """Seconds of a whole arm. The first also has the held-out text scored, and evaluates before its first step."""
    evaluations = plan.evaluations - (index > 0)
    asked = MARGIN * plan.held_out_tokens / machine.teacher_tokens_per_second if index == 0 else 0.0
    steps = plan.steps * step_s(plan, machine, plan.arms[index])
    return MARGIN * machine.start_s + asked + steps + evaluations * evaluation_s(plan, machine) + END_S


def total_s(plan: Plan, machine: Machine) -> float:
    return sum(arm_s(plan, machine, index) for index in range(len(plan.arms))) + PAGE_S


def make_plan(machine: Machine, seconds: float, arms: tuple[Work, ...], seq_len: int, required: int = 2) -> Plan:
    """The best use of `seconds`: at least the `required` arms with one step each, even if that takes longer."""
    plans = [_of_arms(machine, seconds, arms[:count], seq_len) for count in range(required, len(arms) + 1)]
    enough = [plan for plan in plans[1:] if plan.steps >= THIRD_ARM_STEPS]
    return enough[-1] if enough else plans[0]


def _of_arms(machine: Machine, seconds: float, arms: tuple[Work, ...], seq_len: int) -> Plan:
    for rows in ROWS:
        plan = Plan(arms, 0, rows, seq_len)
        evaluating = (len(arms) + 1) * evaluation_s(plan, machine)
        asking = MARGIN * plan.held_out_tokens / machine.teacher_tokens_per_second
        if evaluating + asking <= EVALUATION_SHARE * seconds:
            break
    plan = _with_steps(plan, machine, seconds)
    # An evaluation in the middle, for the curves, if it costs little.
    with_middle = _with_steps(replace(plan, evaluations=3), machine, seconds)
    return with_middle if with_middle.steps >= max(2, 0.9 * plan.steps) else plan


def _with_steps(plan: Plan, machine: Machine, seconds: float) -> Plan:
    a_step = sum(step_s(plan, machine, arm) for arm in plan.arms)
    steps = max(1, int((seconds - total_s(replace(plan, steps=0), machine)) / a_step))
    plan = replace(plan, steps=steps)
    return replace(plan, seconds=total_s(plan, machine))


def time_limit_s(plan: Plan, machine: Machine, index: int, left_s: float, required: int) -> float:
    """Seconds after which the arm starts no further step, leaving the required arms after it a share of `left_s`."""
    needed = [arm_s(plan, machine, other) for other in range(index, max(required, index + 1))]
    return max(1.0, left_s * needed[0] / sum(needed) - evaluation_s(plan, machine) - END_S)


def slowed(machine: Machine, factor: float) -> Machine:
    """The machine if a step takes `factor` times as long as planned; a factor below 1 is ignored."""
    factor = max(1.0, factor)
    rates = ("teacher_tokens_per_second", "student_tokens_per_second", "evaluation_tokens_per_second")
    changes = {name: getattr(machine, name) / factor for name in rates}
    return replace(machine, start_s=machine.start_s * factor, **changes)


def describe(plan: Plan, seconds: float, before_s: float) -> str:
    """The plan in words: what will be done in `seconds`, after the first `before_s` of the demo's time."""
    arms = ", ".join(name.replace("_", " ") for name in plan.names)
    done_at = (before_s + plan.seconds) / 60
    text = (
        f"The plan: {len(plan.arms)} arms ({arms}) of {plan.steps_in_words} of {plan.seq_len} tokens each, "
        f"evaluated on {plan.held_out_tokens:,} held-out tokens; done after {done_at:.1f} minutes, "
        f"of which {before_s / 60:.1f} have passed."
    )
    if plan.seconds > seconds:
        text += " This is the least that shows anything, but takes longer than --minutes allows."
    return text


def minutes_for(plan: Plan, machine: Machine, seconds_before: float, *, steps: int, held_out_factor: float) -> float:
    """The demo's total minutes with `steps` steps per arm and `held_out_factor` times the held-out text."""
    more = replace(plan, steps=steps, held_out_rows=round(plan.held_out_rows * held_out_factor))
    return (seconds_before + total_s(more, machine)) / 60
