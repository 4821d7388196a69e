"""What is said of a stage: after a while, then now and then, in lines or in rows that fit the terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console, Group

from teacher_proto.process import stages
from teacher_proto.process.stages import Display, Stage

STAGES = [
    Stage("indexing source 'web'", 1000, "MB", done=340),
    Stage("loading the student"),
    Stage("held-out targets", 16, "batches", note=lambda: "312 of 4,096 tokens, 20 tokens/s, about 3 min 9 s left"),
    Stage("a stage whose name goes on and on beyond what the width of any terminal could be expected to be", 9, "MB"),
    Stage("held-out targets", 16, "batches", note=lambda: "word " * 100),
]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("place", range(len(STAGES)))
def test_rows_fit_the_terminal(place: int, width: int) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as caught:
        console.print(Group(*STAGES[place].rows(width)))
    rows = caught.get().splitlines()
    assert all(len(row) <= width for row in rows), rows
    assert len(rows) == (2 if STAGES[place].note() else 1), rows


def test_eighty_columns_have_room_for_bar_count_and_time() -> None:
    stage = Stage("indexing source 'web'", 1000, "MB", done=340)
    stage.began -= 75
    console = Console(width=80, color_system=None)
    with console.capture() as caught:
        console.print(Group(*stage.rows(80)))
    assert re.fullmatch(r"indexing source 'web'  ━{4,}.* 1 min 15 s  340/1,000 MB  2 min 2\d s left\s*", caught.get())
    assert re.fullmatch(r"indexing source 'web': 340 of 1,000 MB, 1 min 15 s, about 2 min 2\d s left", stage.line())


def test_a_stage_is_spoken_of_after_a_while_and_then_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "EVERY_S", 1.0)
    display = Display()
    with display.stage("short"):
        time.sleep(0.3)
    assert capsys.readouterr().err == ""
    with display.stage("long", 10, "batches", first_s=0.5) as doing:
        doing.done = 3
        deadline = time.monotonic() + 30
        said = ""
        while said.count("\n") < 2:
            time.sleep(0.1)
            said += capsys.readouterr().err
            assert time.monotonic() < deadline, said
    lines = (said + capsys.readouterr().err).splitlines()
    assert all(line.startswith("long: 3 of 10 batches, ") for line in lines[:-1]), lines
    assert re.fullmatch(r"long: done in \d+ s", lines[-1])


def test_the_innermost_stage_is_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    display, said = Display(), ""
    with display.stage("outer", first_s=0.2), display.stage("inner", first_s=0.2):
        deadline = time.monotonic() + 30
        while "\n" not in said and time.monotonic() < deadline:
            time.sleep(0.1)
            said += capsys.readouterr().err
    assert said.startswith("inner: ")


def test_what_is_off_and_what_another_rank_does_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    display = Display()
    assert display.shown == "off"
    with display.stage("long", first_s=0.0):
        time.sleep(0.8)
    assert capsys.readouterr().err == ""


TERMINAL = """
import time
from teacher_proto.process.stages import stage
with stage("indexing", 100, "MB") as doing:
    for _ in range(30):
        doing.done += 1
        time.sleep(0.1)
"""


def test_a_terminal_gets_a_bar_and_its_cursor_back() -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", TERMINAL], stderr=follower, env={**os.environ, "COLUMNS": "80"})
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
        seen += part
    os.close(leader)
    assert process.wait(60) == 0
    text = seen.decode()
    assert re.search(r"indexing.*━.*\d+/100 MB", text), text
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l") > 0, "the cursor is gone"
