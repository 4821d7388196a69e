"""What a demo plans on a slow machine and on a fast one: arithmetic, without a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from demo.measure import Machine
from demo.plan import MARGIN, ROWS, Work, arm_s, describe, make_plan, minutes_for, slowed, step_s, total_s

WORKS = (Work("distilled", True), Work("cross_entropy", False), Work("sampled", True))


def machine(teacher: float, student: float, evaluation: float, start_s: float) -> Machine:
    return Machine(
        cpu="a CPU", cores=2, teacher_dtype="float32", student_dtype="float32", teacher_tokens_per_second=teacher,
        student_tokens_per_second=student, evaluation_tokens_per_second=evaluation, start_s=start_s,
    )  # fmt: skip


SLOW = machine(teacher=200, student=50, evaluation=160, start_s=14)
FAST = machine(teacher=1500, student=400, evaluation=1300, start_s=6)


@pytest.mark.parametrize("seconds", [240, 400, 900])
@pytest.mark.parametrize("of", [SLOW, FAST])
def test_a_plan_fits_its_time_and_uses_it(of: Machine, seconds: float) -> None:
    plan = make_plan(of, seconds, WORKS, 256)
    assert plan.seconds == pytest.approx(total_s(plan, of))
    assert plan.seconds <= seconds and "longer than" not in describe(plan, seconds, 60)
    assert f"done after {(60 + plan.seconds) / 60:.1f} minutes" in describe(plan, seconds, 60)
    # No step more of each arm would have fitted.
    assert total_s(replace(plan, steps=plan.steps + 1), of) > seconds


def test_a_slow_machine_makes_two_arms_of_few_steps_and_a_fast_one_three_of_many() -> None:
    slow, fast = make_plan(SLOW, 400, WORKS, 256), make_plan(FAST, 400, WORKS, 256)
    assert slow.names == ("distilled", "cross_entropy") and fast.names == tuple(work.name for work in WORKS)
    assert 8 <= slow.steps < 30 <= fast.steps
    assert slow.held_out_rows < fast.held_out_rows == ROWS[0]
    # What an arm costs by hand: start, held-out text scored once, evaluations, steps of both models, the end.
    arm = slow.arms[1]
    assert step_s(slow, SLOW, arm) == pytest.approx(MARGIN * 256 / 50)
    assert step_s(slow, SLOW, slow.arms[0]) == pytest.approx(MARGIN * (256 / 50 + 256 / 200))


def test_more_minutes_make_more_steps() -> None:
    steps = [make_plan(SLOW, 60 * minutes, WORKS[:2], 256).steps for minutes in (4, 8, 16)]
    assert steps == sorted(steps) and steps[0] < steps[1] < steps[2]


def test_too_little_time_still_makes_a_step_of_each_arm_and_says_what_it_takes() -> None:
    plan = make_plan(SLOW, 30, WORKS, 256)
    assert plan.steps == 1 and len(plan.arms) == 2 and plan.held_out_rows == ROWS[-1]
    assert plan.seconds > 30
    assert "1 step of 256" in describe(plan, 30, 60) and "longer than --minutes allows" in describe(plan, 30, 60)


def test_a_machine_that_becomes_slower_needs_more_and_a_faster_one_is_not_counted_on() -> None:
    plan = make_plan(SLOW, 400, WORKS, 256)
    assert arm_s(plan, slowed(SLOW, 2.0), 1) > 1.8 * (arm_s(plan, SLOW, 1) - 12) + 12
    assert slowed(SLOW, 0.5) == SLOW


def test_minutes_for_more_are_those_of_the_same_arithmetic() -> None:
    plan = make_plan(SLOW, 400, WORKS, 256)
    assert minutes_for(plan, SLOW, 60, steps=plan.steps, held_out_factor=1) == pytest.approx((60 + plan.seconds) / 60)
    assert minutes_for(plan, SLOW, 60, steps=2 * plan.steps, held_out_factor=3) > 10
