"""Measure this machine in a few seconds: the served teacher over HTTP, the real student in the trainer's own step.
Called by the demos; the student is measured by `student_speed`, in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.processes import Processes
from demo.student_speed import StudentSpeed

TEACHER_TOKENS, TEACHER_SECONDS = 256, 3.0


@dataclass(frozen=True)
class Machine:
    """What a plan is based on. Rates are in tokens per second."""

    cpu: str
    cores: int
    teacher_dtype: str
    student_dtype: str
    teacher_tokens_per_second: float
    student_tokens_per_second: float  # trained
    evaluation_tokens_per_second: float
    start_s: float  # of a training run, until its first step could begin

    @classmethod
    def of(cls, student: StudentSpeed, teacher_tokens_per_second: float, teacher_dtype: str) -> Machine:
        return cls(
            cpu=student.cpu, cores=len(os.sched_getaffinity(0)), teacher_dtype=teacher_dtype,
            student_dtype=student.compute, teacher_tokens_per_second=round(teacher_tokens_per_second, 1),
            student_tokens_per_second=round(student.tokens_per_second, 1),
            evaluation_tokens_per_second=round(student.evaluation_tokens_per_second, 1),
            start_s=round(student.start_s, 1),
        )  # fmt: skip


def teacher_speed(url: str, top_k: int) -> float:
    """Tokens per second of the teacher at `url`, over HTTP, with enough sequences at once to fill `TEACHER_SECONDS`."""
    import numpy as np

    from teacher_proto.client.sync_client import SyncTeacherClient
    from teacher_proto.requests import TargetsRequest

    draw = np.random.default_rng(0)

    def seconds(client: Any, count: int) -> float:
        # Random tokens, because the time does not depend on the text.
        sequences = draw.integers(100, 10_000, (count, TEACHER_TOKENS)).tolist()
        began = time.monotonic()
        client.targets(TargetsRequest(sequences=sequences, top_k=top_k))
        return time.monotonic() - began

    with SyncTeacherClient(url) as client:
        seconds(client, 1)  # the first warms up
        one = seconds(client, 1)
        count = min(16, max(2, round(TEACHER_SECONDS / one)))
        return count * TEACHER_TOKENS / seconds(client, count)


class StudentProcess:
    """The demo's side of the process `python -m demo.student_speed`."""

    def __init__(self, processes: Processes, settings: list[str], out: Path, log: Path):
        self._processes = processes
        with log.open("wb") as stderr:
            self._process = processes.start(
                [sys.executable, "-m", "demo.student_speed", str(out), *settings],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip
        self._log, self._answers = log, _answers(self._process)

    def speed(self) -> StudentSpeed:
        return StudentSpeed(**self._ask("measuring the student", {"do": "measure"}))

    def write(self, held_out_rows: int, model: Path) -> None:
        """Order texts from `model`; they are complete when the process has ended."""
        assert self._process.stdin is not None
        order = {"do": "write", "held_out_rows": held_out_rows, "model": str(model)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self.close()

    def close(self) -> None:
        """Send no more orders, which ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _ask(self, what: str, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._processes.screen.until(what, lambda: bool(self._answers) or self._process.poll() is not None)
        if not self._answers:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(
                f"demo.student_speed ended with code {self._process.returncode}; end of {self._log}:\n{end}"
            )
        return self._answers.pop(0)


def _answers(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """A list to which a thread appends the process's responses."""
    answers: list[dict[str, Any]] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.append(json.loads(line))  # noqa: PERF401 -- one by one, as they come

    threading.Thread(target=read, daemon=True).start()
    return answers
