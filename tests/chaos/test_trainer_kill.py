"""A trainer that is killed, stopped or cut off while it saves goes on as if nothing had been: the same trace, the same
parameters, bit for bit. The trainer is a process and the teacher is the real service with the scripted engine.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from student_trainer.checkpoint import checkpoints as checkpoint
from tests.teacher_process import TeacherProcess
from tests.trainer_run import (
    SIGKILL,
    SIGTERM,
    TrainerProcess,
    Workshop,
    final_files,
    lines_of,
    steps_of,
    teacher_script,
    trace_of,
    train,
    wait_for_step,
)

STEPS, EVERY = 40, 7


def arguments(workshop: Workshop, root: Path, teacher: TeacherProcess, *overrides: str) -> list[str]:
    return workshop.settings(
        root, f"run.steps={STEPS}", f"checkpoint.every={EVERY}", "evaluation.every=10", *overrides, url=teacher.url
    )


@pytest.fixture(scope="module")
def straight(workshop: Workshop, teacher: TeacherProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("straight")
    assert train(arguments(workshop, root, teacher), root / "output.txt") == 0, (root / "output.txt").read_text()
    return root / "run"


def assert_same(folder: Path, straight: Path) -> None:
    assert trace_of(folder) == trace_of(straight)
    assert final_files(folder, STEPS) == final_files(straight, STEPS)
    assert lines_of(folder, "evaluation.jsonl") == lines_of(straight, "evaluation.jsonl")


def kill_and_resume(workshop: Workshop, teacher: TeacherProcess, root: Path, seed: int, kills: int) -> None:
    """`kills` times: start, wait until this start has made a random step, wait a random moment more, SIGKILL; then run
    to the end. The steps are spread over the whole run.
    """
    draw = random.Random(seed)
    reached = 0
    for aim in sorted(draw.choices(range(1, STEPS - EVERY), k=kills)):
        aim = max(aim, min(reached + 1, STEPS - 2))
        started = time.time()
        with TrainerProcess(arguments(workshop, root, teacher), root / "output.txt") as trainer:
            wait_for_step(root / "run", aim, trainer, since=started)
            time.sleep(draw.uniform(0, 0.1))
            trainer.signal(SIGKILL)
            trainer.wait()
        kept = checkpoint.newest(root / "run" / "checkpoints")
        reached = kept.step if kept is not None else 0
        # A save is written behind the steps that follow it, so the one under way may be lost with them.
        assert reached > aim - 2 * EVERY, "more was lost than the steps since the save before last"
    assert train(arguments(workshop, root, teacher), root / "output.txt") == 0


def test_a_trainer_killed_at_random_and_resumed_is_the_straight_run(
    workshop: Workshop, teacher: TeacherProcess, straight: Path, tmp_path: Path
) -> None:
    kill_and_resume(workshop, teacher, tmp_path, seed=1, kills=4)
    assert_same(tmp_path / "run", straight)


@pytest.mark.slow
def test_twenty_kills_change_nothing(
    workshop: Workshop, teacher: TeacherProcess, straight: Path, tmp_path: Path
) -> None:
    kill_and_resume(workshop, teacher, tmp_path, seed=2, kills=20)
    assert_same(tmp_path / "run", straight)


def test_sigterm_saves_exits_75_and_loses_no_step(
    workshop: Workshop, teacher: TeacherProcess, straight: Path, tmp_path: Path
) -> None:
    draw = random.Random(3)
    for aim in sorted(draw.sample(range(1, STEPS - 2), 3)):
        with TrainerProcess(arguments(workshop, tmp_path, teacher), tmp_path / "output.txt") as trainer:
            wait_for_step(tmp_path / "run", aim, trainer)
            time.sleep(draw.uniform(0, 0.05))
            trainer.signal(SIGTERM)
            asked = time.monotonic()
            assert trainer.wait() == 75
            assert time.monotonic() - asked < 20
        kept = checkpoint.newest(tmp_path / "run" / "checkpoints")
        assert kept is not None and kept.step == steps_of(tmp_path / "run")[-1]
    assert train(arguments(workshop, tmp_path, teacher), tmp_path / "output.txt") == 0
    assert_same(tmp_path / "run", straight)


def test_sigterm_while_waiting_for_a_teacher_saves_and_exits_75(workshop: Workshop, tmp_path: Path) -> None:
    with (
        TeacherProcess(script=teacher_script()) as teacher,
        TrainerProcess(arguments(workshop, tmp_path, teacher), tmp_path / "output.txt") as trainer,
    ):
        wait_for_step(tmp_path / "run", 3, trainer)
        teacher.signal(SIGKILL)
        teacher.wait()
        time.sleep(1.0)
        step = steps_of(tmp_path / "run")[-1]
        trainer.signal(SIGTERM)
        assert trainer.wait(30) == 75
    kept = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert kept is not None and kept.step == steps_of(tmp_path / "run")[-1] >= step


SAVER = """
import sys, torch
from pathlib import Path
from student_trainer.checkpoint import files as checkpoint_files
from student_trainer.checkpoint.files import Snapshot
root, step = Path(sys.argv[1]), int(sys.argv[2])
tensors = {"model": {"x": torch.full((5000,), float(step))}, "optimizer": {"y": torch.full((700,), float(step))}}
checkpoint_files.write(root, Snapshot(step, tensors, {"step": step}))
checkpoint_files.replace_text(root / "latest", f"step-{step:08d}")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
@pytest.mark.parametrize("call", ["fsync", "rename", "renameat", "write", "ftruncate"])
def test_a_save_cut_at_any_system_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, call: str, fault: str
) -> None:
    """The kernel kills the process, or refuses the call, at the first, second, ... call until none is left to hit."""

    def save(root: Path, step: int, *strace: str) -> int:
        command = [*strace, sys.executable, "-B", "-c", SAVER, str(root), str(step)]
        return subprocess.run(command, capture_output=True, timeout=120).returncode

    old = tmp_path / "old"
    old.mkdir()
    assert save(old, 1) == 0
    for when in range(1, 40):
        root = tmp_path / str(when)
        shutil.copytree(old, root)
        inject = f"--inject={call}:{fault}:when={when}"
        code = save(root, 2, "strace", "-f", "-qq", "-o", "/dev/null", f"--trace={call}", inject)
        snapshot = checkpoint.newest(root)
        assert snapshot is not None
        for tensors in snapshot.tensors.values():
            assert all(bool((tensor == snapshot.step).all()) for tensor in tensors.values()), "old and new are mixed"
        if code == 0:
            assert snapshot.step == 2
            return
        assert save(root, 2) == 0, "what the cut save left behind is in the way of the next"
    raise AssertionError(f"the save never came to its end, not even past {when} calls of {call}")
