"""`make demo` with little time: the real model behind real vLLM, real trainers, summary and page; and stopping it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
# A machine that runs other tests beside it may take several times as long.
PATIENCE_S = 240


class Demo:
    """`python -m demo.run` in a folder of its own; its lines with the time at which they came."""

    def __init__(self, folder: Path, minutes: float):
        for name in ("demo", ".cache"):
            (folder / name).symlink_to(ROOT / name)
        self.folder, self.began = folder, time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demo.run", "--minutes", str(minutes)], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip
        self.lines: list[str] = []
        self.times = [self.began]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.times.append(time.monotonic())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, words: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {words!r} in:\n{self.text}"
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        """All that it has started, and what they have started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=30)
        self._reader.join(timeout=30)


@pytest.fixture
def demo(tmp_path: Path, demo_teacher: Path) -> Iterator[object]:
    """Starts demos, and ends them with the test."""
    started: list[Demo] = []

    def start(minutes: float) -> Demo:
        started.append(Demo(tmp_path, minutes))
        return started[-1]

    yield start
    for one in started:
        one.close()


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(family: list[psutil.Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while left := [process for process in family if is_running(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.vllm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_whose_teacher_starts_stops_with_all_that_it_started(demo, number: signal.Signals) -> None:
    running = demo(3)
    running.wait_for("starting stillhouse-teacher", PATIENCE_S)
    family = running.family()
    assert len(family) >= 2  # the teacher, and the process that measures the student
    told = time.monotonic()
    running.process.send_signal(number)
    assert running.process.wait(timeout=30) == 128 + number
    assert time.monotonic() - told < 15  # five seconds where nothing else runs
    wait_until_gone(family, 5)
    assert f"stopped by {number.name}" in running.text


@pytest.mark.vllm
def test_a_demo_that_is_killed_leaves_nothing(demo) -> None:
    running = demo(3)
    running.wait_for("starting stillhouse-teacher", PATIENCE_S)
    family = running.family()
    assert len(family) >= 2
    running.process.kill()
    wait_until_gone(family, 30)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_demo_that_trains_stops_with_all_that_it_started(demo) -> None:
    running = demo(4)
    running.wait_for("distilled: step 1 of", 2 * PATIENCE_S)
    family = running.family()
    assert any("stillhouse-train" in " ".join(process.cmdline()) for process in family)
    told = time.monotonic()
    running.process.terminate()
    assert running.process.wait(timeout=30) == 143
    assert time.monotonic() - told < 15
    wait_until_gone(family, 5)


@pytest.mark.slow
@pytest.mark.vllm
def test_demo_goes_through_and_says_what_it_found(demo) -> None:
    running = demo(3)
    assert running.process.wait(timeout=1200) == 0, running.text
    running.close()
    gaps = [after - before for before, after in zip(running.times, running.times[1:], strict=False)]
    assert max(gaps) < 20, running.text  # ten seconds where nothing else runs
    folder = running.folder / "runs/demo"
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"seconds", "teacher", "machine", "arms", "verdict"}
    check_machine(summary["machine"], running.text)
    arms = summary["arms"]
    assert {"cross_entropy", "distilled"} <= set(arms) <= {"cross_entropy", "distilled", "sampled"}
    for arm in arms.values():
        for when in ("before", "after"):
            assert set(arm[when]) == {"prose", "code"}
            for figures in arm[when].values():
                assert set(figures) == {"cross_entropy", "kl", "agreement", "tokens"} and figures["tokens"] > 200
    # The same student before: the arms differ in the loss alone.
    assert arms["cross_entropy"]["before"] == arms["distilled"]["before"]
    assert arms["cross_entropy"]["after"] != arms["distilled"]["after"]
    settings = [(folder / name / "settings.yaml").read_text().splitlines() for name in ("cross_entropy", "distilled")]
    differ = {line.split(":")[0].strip() for line in set(settings[0]) ^ set(settings[1])}
    assert differ <= {"terms", "cross_entropy", "top_k_kl", "kind", "id", "time_limit_s", "at_start", "steps", "every"}
    check_page((folder / "report.html").read_text())
    said = summary["verdict"]
    assert said["teacher_helps"] == (said["what_it_takes"] == "")
    assert "agreement over both sources" in running.text


def check_machine(machine: dict, text: str) -> None:
    assert machine["cpu"] and machine["cores"] >= 1 and machine["cpu"] in text.replace("\n", " ")
    for name in ("teacher_tokens_per_second", "student_tokens_per_second", "evaluation_tokens_per_second", "start_s"):
        assert machine[name] > 0
    assert machine["teacher_dtype"] in ("float32", "bfloat16") and machine["student_dtype"] in ("float32", "bfloat16")
    assert machine["plan"]["steps"] >= 1 and "held-out tokens" in text.replace("\n", " ")


def check_page(page: str) -> None:
    assert '"passages": [{' in page
    for who in ("<dt>teacher</dt>", "<dt>pruned, step 0</dt>", "<dt>distilled, step ", "<dt>cross entropy, step "):
        assert who in page
