"""What a demo does when the machine is not as fast as it was measured: its schedule, with trainers that only write."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from demo import arms
from demo.arms import run_arms
from demo.plan import Plan, make_plan, step_s
from demo.processes import Processes
from tests.unit.demo.test_plan import FAST, SLOW, WORKS
from tests.unit.demo.test_processes import screen_to_text

ABOUT = {work.name: "a loss" for work in WORKS}


class Trainers:
    """Stand where `stillhouse-train` does: each writes the steps it is said to make, at the pace it is said to have."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, runs: Path, slower: float = 1.0, first_makes: int | None = None
    ):
        self.runs, self.slower, self.first_makes = runs, slower, first_makes
        self.asked: list[dict[str, str]] = []
        monkeypatch.setattr(arms, "train", self.train)

    def settings(self, plan: Plan, index: int) -> list[str]:
        return [
            f"run.id={plan.names[index]}",
            f"run.steps={plan.steps}",
            f"seconds={step_s(plan, self.machine, plan.arms[index])}",
        ]

    def train(self, processes: Any, what: str, settings: list[str], detail: Any, deadline: float) -> None:
        asked = dict(line.split("=") for line in settings)
        self.asked.append(asked)
        steps = int(asked["run.steps"])
        if len(self.asked) == 1 and self.first_makes is not None:
            steps = self.first_makes
        run = self.runs / asked["run.id"]
        run.mkdir()
        line = json.dumps({"seconds": float(asked["seconds"]) * self.slower})
        (run / "metrics.jsonl").write_text(f"{line}\n" * steps)
        assert detail() == f"step {steps} of {asked['run.steps']}"

    def go(self, machine: Any, seconds: float, left_s: float | None = None) -> dict[str, int]:
        self.machine = machine
        plan = make_plan(machine, seconds, WORKS, 256)
        screen, self.told = screen_to_text()
        with Processes(screen) as processes:
            deadline = time.monotonic() + (left_s or seconds)
            return run_arms(processes, self.runs, plan, machine, deadline, 2, self.settings, ABOUT)


def test_a_machine_that_keeps_its_pace_makes_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainers = Trainers(monkeypatch, tmp_path)
    plan = make_plan(FAST, 400, WORKS, 256)
    assert trainers.go(FAST, 400) == dict.fromkeys(plan.names, plan.steps)
    limits = [float(asked["run.time_limit_s"]) for asked in trainers.asked]
    # The first has its share of what the two that must be made need, and what a third would take is theirs to lose.
    assert 100 < limits[0] < 250 and limits[0] < limits[1] <= 400


def test_a_first_arm_that_its_time_ends_is_followed_by_one_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainers = Trainers(monkeypatch, tmp_path, slower=2.0, first_makes=9)
    assert trainers.go(SLOW, 400) == {"distilled": 9, "cross_entropy": 9}
    assert trainers.asked[1]["run.steps"] == "9"


def test_a_third_arm_is_left_out_where_it_no_longer_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainers = Trainers(monkeypatch, tmp_path, slower=20.0)
    assert set(trainers.go(FAST, 400)) == {"distilled", "cross_entropy"}
    assert "not enough time left for sampled" in trainers.told.getvalue()
