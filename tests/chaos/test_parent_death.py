"""Whoever is killed leaves nobody behind: services, the processes that they started, trainers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.teacher_process import TeacherProcess, free_port
from tests.trainer_run import Workshop

# Starts the command that its arguments are, and waits.
STARTER = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
WITHIN_S = 15.0  # five where nothing else runs


def all_end(processes: list[psutil.Process], within_s: float = WITHIN_S) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    for process in alive:
        process.kill()
    return not alive


def start_and_kill_the_starter(command: list[str], until: Path, said: str, **environment: str) -> list[psutil.Process]:
    """The processes that ran when their starter was killed, once `said` was in the file `until`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
    with until.open("wb") as output:
        starter = subprocess.Popen(
            [sys.executable, "-c", STARTER, *command], stdout=output, stderr=output,
            env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while said not in until.read_text():
        assert time.monotonic() < deadline, until.read_text()
        time.sleep(0.05)
    started = psutil.Process(starter.pid).children(recursive=True)
    starter.kill()
    starter.wait()
    return started


def scripted(*options: str) -> list[str]:
    return [sys.executable, "-m", "teacher_service.main", "scripted", "--engine", "scripted", "--port", "0", *options]


def test_a_service_ends_with_the_process_that_started_it_where_it_is_told_to(tmp_path: Path) -> None:
    started = start_and_kill_the_starter(scripted(), tmp_path / "log", "ready at", STILLHOUSE_DIE_WITH_PARENT="1")
    assert started and all_end(started)
    assert "drained" in (tmp_path / "log").read_text(), "it has time to end in peace"


def test_a_service_outlives_the_process_that_started_it_otherwise(tmp_path: Path) -> None:
    started = start_and_kill_the_starter(scripted(), tmp_path / "log", "ready at")
    time.sleep(2.0)
    assert all(process.is_running() for process in started) and not all_end(started, within_s=0.1)


def test_a_trainer_ends_with_the_process_that_started_it(tmp_path: Path, workshop: Workshop) -> None:
    """While it waits for a teacher that never comes, which it would for an hour."""
    url = f"http://127.0.0.1:{free_port()}"
    settings = workshop.settings(tmp_path, "teacher.start_within_s=600", "data.workers=2", url=url)
    command = [sys.executable, "-m", "student_trainer.main", *settings]
    started = start_and_kill_the_starter(
        command, tmp_path / "log", "the student computes in", STILLHOUSE_DIE_WITH_PARENT="1"
    )
    assert started and all_end(started)


@pytest.mark.vllm
@pytest.mark.parametrize(("several", "processes"), [("0", 1), ("1", 3)])
def test_a_killed_teacher_leaves_no_engine_process(tiny_llama: Path, several: str, processes: int) -> None:
    """The engine in the process beside the service; and in one that vLLM starts from there, with a worker."""
    options = (str(tiny_llama), "--engine=vllm", "--max-num-seqs=4", "--kv-cache-bytes=4194304")
    with TeacherProcess(*options, environment={"VLLM_ENABLE_V1_MULTIPROCESSING": several}) as teacher:
        children = psutil.Process(teacher.pid).children(recursive=True)
        engines = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        assert len(engines) == processes
        os.kill(teacher.pid, signal.SIGKILL)
        assert all_end(children)


@pytest.mark.vllm
@pytest.mark.parametrize("after_s", [0.5, 4.0])
def test_a_teacher_that_is_killed_or_stopped_while_it_starts_leaves_nobody(tiny_llama: Path, after_s: float) -> None:
    """4 s after its engine's process began, that one imports vLLM."""
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 1)):
        with TeacherProcess(str(tiny_llama), "--engine=vllm", wait=False) as teacher:
            process = psutil.Process(teacher.pid)
            deadline = time.monotonic() + 120
            while not (children := process.children(recursive=True)):
                assert time.monotonic() < deadline, teacher.log
                time.sleep(0.05)
            time.sleep(after_s)
            children = process.children(recursive=True)
            teacher.signal(number)
            assert teacher.wait(WITHIN_S) == code
            assert all_end(children)
            assert "Traceback" not in teacher.log and "leaked" not in teacher.log
