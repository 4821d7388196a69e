"""Serve the demos' teacher, and measure this machine with it. Called by the demos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from demo.measure import Machine, StudentProcess, teacher_speed
from demo.prepare import TEACHER
from demo.processes import Processes
from student_trainer.reporting.json_lines import read_lines

NAME = "SmolLM2-135M-Instruct"
TOP_K = 64


@dataclass(frozen=True)
class Teacher:
    url: str
    about: dict[str, Any]

    @classmethod
    def at(cls, url: str) -> Teacher:
        return cls(url, httpx.get(f"{url}/v1/teacher", timeout=30).raise_for_status().json())

    @property
    def dtype(self) -> str:
        return str(self.about["identity"]["semantic"]["dtype"])

    def as_json(self) -> dict[str, Any]:
        return {**self.about["identity"], "fingerprint": self.about["fingerprint"]}


@contextmanager
def serve_teacher(
    processes: Processes, runs: Path, model: Path = TEACHER, name: str = NAME, *more: str
) -> Iterator[Callable[[], Teacher]]:
    """Run `stillhouse-teacher` with the demo's teacher or another, with `more` options and its log under `runs`. Yields
    a function that waits until it is ready.

    Its store serves what an earlier arm has requested: all arms are evaluated on the same held-out text.
    """
    options = [str(model), "--name", name, "--max-model-len", "1024", "--store", str(runs / "targets"), *more]
    with processes.serve("stillhouse-teacher", options, runs / "teacher.log") as url:
        yield lambda: Teacher.at(url())


def measure_machine(processes: Processes, teacher: Teacher, student: StudentProcess) -> Machine:
    """Measure each for a few seconds, one after the other."""
    processes.screen.say("measuring this machine: the teacher, then the student")
    rate = processes.screen.background("measuring the teacher", lambda: teacher_speed(teacher.url, TOP_K))
    machine = Machine.of(student.speed(), rate, teacher.dtype)
    processes.screen.say(
        f"{machine.cpu}, {machine.cores} cores: the teacher scores {machine.teacher_tokens_per_second:,.0f} tokens per "
        f"second in {machine.teacher_dtype}, the student trains on {machine.student_tokens_per_second:,.0f} in "
        f"{machine.student_dtype}"
    )
    return machine


def ends(run: Path, before: Path | None = None) -> dict[str, Any]:
    """The first and the last evaluation of a run, by source. If the run did not evaluate at its start, the first is
    that of `before`, another run of the same student.
    """
    first = read_lines((before or run) / "evaluation.jsonl")[0]
    last = read_lines(run / "evaluation.jsonl")[-1]
    return {when: {k: v for k, v in line.items() if k != "step"} for when, line in (("before", first), ("after", last))}
