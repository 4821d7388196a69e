"""A demo's processes end with it, whatever ends it, and it is never silent for long."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from demo.processes import Processes, TooLongError
from demo.screen import Screen

ROOT = Path(__file__).resolve().parents[3]
# Starts one child that heeds SIGTERM and one that does not, each with a child of its own, and waits.
DEMO = """
import sys, time
from demo.processes import Processes, stoppable
from demo.screen import Screen
CHILD = '''
import signal, subprocess, sys, time
if sys.argv[1] == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(inner.pid, flush=True)
time.sleep(600)
'''
with stoppable(), Processes(Screen()) as processes:
    for kind in ("obedient", "deaf"):
        process = processes.start([sys.executable, "-c", CHILD, kind], stdout=-1, text=True)
        print(process.pid, process.stdout.readline().strip(), flush=True)
    print("ready", flush=True)
    processes.screen.until("nothing", lambda: False)
"""


def is_alive(pid: int) -> bool:
    """A zombie that its new parent has not taken yet is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_demo_with_all_that_it_has_started(number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEMO], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout and demo.stderr
        pids = [int(pid) for _ in range(2) for pid in demo.stdout.readline().split()]
        assert demo.stdout.readline() == "ready\n" and len(pids) == 4 and all(map(is_alive, pids))
        told = time.monotonic()
        demo.send_signal(number)
        assert demo.wait(timeout=30) == code
        took_s = time.monotonic() - told
        assert not any(map(is_alive, pids))
        assert f"stopped by {number.name}" in demo.stderr.read()
    assert took_s < 5


def screen_to_text() -> tuple[Screen, io.StringIO]:
    text = io.StringIO()
    return Screen(Console(file=text, width=80), silent_s=0.3), text


def test_lines_of_a_command_are_passed_on_and_silence_is_broken() -> None:
    screen, text = screen_to_text()
    with Processes(screen) as processes:
        command = "import time; print('[one] line', flush=True); time.sleep(1.2); print('two')"
        processes.run("the work", [sys.executable, "-c", command], detail=lambda: "step 1 of 2")
    lines = text.getvalue().splitlines()
    assert lines[0] == "[one] line" and lines[-1] == "two"
    assert len(lines) >= 4 and all("the work: " in line and "step 1 of 2" in line for line in lines[1:-1])


def test_a_command_that_fails_or_takes_too_long_is_told() -> None:
    screen, _ = screen_to_text()
    with Processes(screen) as processes:
        with pytest.raises(SystemExit, match="the work ended with code 3"):
            processes.run("the work", [sys.executable, "-c", "raise SystemExit(3)"])
        began = time.monotonic()
        with pytest.raises(TooLongError):
            processes.run("the work", [sys.executable, "-c", "import time; time.sleep(600)"], deadline=began + 0.5)
        assert time.monotonic() - began < 30


def test_a_service_that_ends_instead_of_serving_is_told_with_its_log(tmp_path: Path) -> None:
    screen, _ = screen_to_text()
    with (
        Processes(screen) as processes,
        processes.serve("stillhouse-teacher", ["--no-such-option"], tmp_path / "log") as url,
        pytest.raises(SystemExit, match="stillhouse-teacher ended with code 2"),
    ):
        url()


def test_children_are_in_sessions_of_their_own() -> None:
    screen, _ = screen_to_text()
    with Processes(screen) as processes:
        process = processes.start([sys.executable, "-c", "import time; time.sleep(600)"])
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
    assert process.poll() is not None


def test_work_in_the_background_gives_what_it_gives_and_is_not_silent() -> None:
    screen, text = screen_to_text()
    assert screen.background("slow work", lambda: time.sleep(0.8) or 5) == 5
    assert "slow work: " in text.getvalue()
    with pytest.raises(ValueError, match="as it was raised"):
        screen.background("bad work", lambda: int_of("as it was raised"))


def int_of(text: str) -> int:
    raise ValueError(text)
