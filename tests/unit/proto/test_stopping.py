"""Signals to a process of its own, whatever its main thread does: `teacher_proto.process.stopping`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from teacher_proto.process.tree import descendants

# What every program below begins with. `stuck` is a native call that no signal ends: a mutex that is locked twice.
BEGINNING = """
import asyncio, ctypes, os, subprocess, sys, time
from teacher_proto.process.command_end import stoppable
from teacher_proto.process.stopping import Stop, StopSignals, finishing

def say(text):
    print(text, flush=True)

def stuck():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    say("ready")
    libc.pthread_mutex_lock(mutex)

def main(signals):
"""
ENDING = """
sys.exit(stoppable("program", main))
"""
# Promised are 5 s; a busy machine is given three times as long.
BOUND_S = 15.0


@contextmanager
def program(body: str) -> Iterator[subprocess.Popen[str]]:
    """Runs `body` as the command, until it has printed a line."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", BEGINNING + lines + ENDING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        _wait_until_busy(process.pid)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def _wait_until_busy(pid: int) -> None:
    """Until the main thread has gone past the line: it sleeps, time and again, or it has computed for a while."""
    seen, deadline = "", time.monotonic() + 30
    while len(seen) < 10 or len(set(seen[-10:])) > 1:
        assert time.monotonic() < deadline, seen
        time.sleep(0.03)
        seen += Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str, str]:
    """The exit code and all that was printed after the first line."""
    asked = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    took_s = time.monotonic() - asked
    print(f"ended with {process.returncode} after {took_s:.2f} s")
    assert took_s < BOUND_S, err
    return process.returncode, out, err


WAITING = {
    "sleep": 'say("ready"); time.sleep(600)',
    "future": 'from concurrent.futures import Future; say("ready"); Future().result()',
    "computing": 'say("ready")\nwhile True: sum(range(1000))',
    "an error taken for a failure": """
say("ready")
for _ in range(1000):
    try:
        time.sleep(1)
    except BaseException:
        pass
    try:
        time.sleep(600)
    except Exception:
        pass
""",
    "a finaliser": """
class Held:
    def __del__(self):
        say("ready")
        time.sleep(600)
Held()
time.sleep(600)
""",
    "an object that is left half made": """
class Half:
    def __init__(self):
        say("ready")
        time.sleep(600)
        self.made = True
    def __del__(self):
        self.made
Half()
""",
    "native": "stuck()",
    "event loop": """
async def wait():
    with signals.cancelling(asyncio.current_task()):
        say("ready")
        await asyncio.sleep(600)
try:
    asyncio.run(wait())
except asyncio.CancelledError:
    signals.check()
""",
    "a thread of the event loop": """
async def wait():
    with signals.cancelling(asyncio.current_task()):
        await asyncio.to_thread(stuck)
asyncio.run(wait())
""",
    "closing": """
try:
    say("ready")
    time.sleep(600)
except Stop:
    signals.obey()
    stuck()
""",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", WAITING.values(), ids=WAITING.keys())
def test_a_signal_ends_whatever_the_main_thread_does(body: str, number: int) -> None:
    with program(body) as process:
        code, _, err = stop(process, number)
    assert code == 75
    assert f"program: {signal.Signals(number).name} received, stopping" in err
    assert "Traceback" not in err


def test_what_is_held_is_finished_first() -> None:
    body = """
with signals.holding():
    say("ready")
    time.sleep(5.5)
    say("held")
    with finishing():
        say("saved")
say("never")
"""
    with program(body) as process:
        code, out, _ = stop(process)
    assert code == 75
    assert out == "held\nsaved\n"


def test_a_block_inside_one_that_holds_is_ended_at_once() -> None:
    body = """
with signals.holding():
    try:
        with signals.raising():
            say("ready")
            time.sleep(600)
    except signals.Stop:
        signals.obey()
        say("caught")
        return 75
"""
    with program(body) as process:
        code, out, _ = stop(process)
    assert code == 75
    assert out == "caught\n"


def test_a_main_thread_that_is_stuck_is_rescued_by_another() -> None:
    """It never runs again, though its native call comes back while the other saves."""
    body = """
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
def save():
    libc.pthread_mutex_unlock(mutex)
    time.sleep(1)
    say("saved")
with signals.holding(), signals.rescued(save), signals.raising():
    libc.pthread_mutex_lock(mutex)
    say("ready")
    libc.pthread_mutex_lock(mutex)
    say("never")
"""
    with program(body) as process:
        code, out, _ = stop(process)
    assert code == 75
    assert out == "saved\n"


def test_a_rescue_that_fails_says_so() -> None:
    with program("with signals.rescued(lambda: 1 / 0):\n    stuck()") as process:
        code, _, err = stop(process)
    assert code == 1
    assert "program: ZeroDivisionError: division by zero" in err


def test_the_second_ctrl_c_ends_a_save_and_the_same_one_twice_does_not() -> None:
    with program('with signals.holding():\n    say("ready"); time.sleep(3); say("saved"); time.sleep(600)') as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # as a wrapper passes on what the terminal has sent already
        assert process.stdout is not None
        assert process.stdout.readline() == "saved\n"
        code, _, err = stop(process, signal.SIGINT)
    assert code == 130
    assert "ending at once" in err


def test_processes_that_were_started_end_with_it() -> None:
    """A child, what the child started, and what is left of a child that was itself ended."""
    body = """
nested = 'import subprocess, sys; subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])'
child = subprocess.Popen([sys.executable, "-c", nested])
try:
    say("ready")
    time.sleep(600)
except Stop:
    child.kill()
    raise
"""
    with program(body) as process:
        deadline = time.monotonic() + 30
        while len(started := descendants(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert stop(process)[0] == 75
        for pid in started:
            assert not _runs(pid), f"{pid} is left"


def test_a_child_that_was_forked_has_its_signals_for_itself() -> None:
    body = """
began, begin = os.pipe()
child = os.fork()
if child == 0:
    os.write(begin, b"x")
    time.sleep(600)
os.read(began, 1)
os.kill(child, 15)
say("ready")
say(str(os.waitpid(child, 0)[1]))
time.sleep(600)
"""
    with program(body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "15\n", "the child did not end by the signal"
        assert process.poll() is None
        assert stop(process)[0] == 75


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_command_without_a_signal_ends_as_it_does() -> None:
    lines = BEGINNING + "    return 3\n" + ENDING
    assert subprocess.run([sys.executable, "-c", lines], check=False, timeout=60, env=os.environ).returncode == 3
