"""A process ends when the one that started it is gone: killed, however it was started, and only if asked to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# Starts the child whose code is its second argument, writes its pid into the file that is its first, and waits.
PARENT = """
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
pathlib.Path(sys.argv[1] + ".tmp").write_text(str(child.pid))
pathlib.Path(sys.argv[1] + ".tmp").rename(sys.argv[1])
time.sleep(600)
"""
SLEEP = "import time, pathlib; pathlib.Path(r'{ready}').touch(); time.sleep(600)"
ASK = "from teacher_proto.process.parent import end_with_parent_if_asked as ask; ask(); "
WITHOUT_PIDFD = "import os; vars(os).pop('pidfd_open', None); "
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
SPAWNED = """
import multiprocessing, pathlib, sys, time

def work(ready):
    from teacher_proto.process.parent import end_spawned_with_parent
    end_spawned_with_parent()
    pathlib.Path(ready).write_text(str(__import__("os").getpid()))
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=work, args=(sys.argv[2],))
    process.start()
    process.join()
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or (path.suffix == ".pid" and not path.read_text()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def ended(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def orphan(tmp_path: Path, code: str, asked: str | None) -> int:
    """The pid of a child that runs, whose parent has just been killed."""
    ready, pid_file = tmp_path / "ready", tmp_path / "child.pid"
    environment = {name: value for name, value in os.environ.items() if name != "STILLHOUSE_DIE_WITH_PARENT"}
    if asked is not None:
        environment["STILLHOUSE_DIE_WITH_PARENT"] = asked
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(pid_file), code + SLEEP.format(ready=ready)], env=environment
    )
    wait_for(pid_file)
    wait_for(ready)
    parent.kill()
    parent.wait()
    return int(pid_file.read_text())


@pytest.mark.parametrize("prelude", ["", WITHOUT_PIDFD, DEAF])
def test_a_child_that_is_asked_to_ends_when_its_parent_is_killed(tmp_path: Path, prelude: str) -> None:
    pid = orphan(tmp_path, prelude + ASK, "1")
    assert ended(pid, 15.0)


@pytest.mark.parametrize("asked", [None, "", "0"])
def test_a_child_that_is_not_asked_to_goes_on(tmp_path: Path, asked: str | None) -> None:
    pid = orphan(tmp_path, ASK, asked)
    try:
        assert not ended(pid, 2.5)
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_what_multiprocessing_starts_ends_too(tmp_path: Path, method: str) -> None:
    script, ready = tmp_path / "script.py", tmp_path / "ready.pid"
    script.write_text(SPAWNED)
    parent = subprocess.Popen([sys.executable, str(script), method, str(ready)])
    wait_for(ready)
    assert not ended(int(ready.read_text()), 1.0), "its parent is still there"
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert ended(int(ready.read_text()), 15.0)
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive, "a fork server or a resource tracker stayed behind"
