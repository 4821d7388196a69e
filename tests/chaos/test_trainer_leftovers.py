"""What a killed trainer leaves half made is gone after the next start; nobody removes what a living one works on."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from student_trainer.checkpoint.run_folder import LEFTOVERS, RunFolder, sweep, take
from tests.teacher_process import TeacherProcess
from tests.trainer_run import SIGKILL, TrainerProcess, Workshop, steps_of, trace_of, train, wait_for_step

STEPS = 6
FILES = "student_trainer.checkpoint.files"
TIMES = [1, pytest.param(20, marks=pytest.mark.slow)]


def given(workshop: Workshop, root: Path, teacher: TeacherProcess, *more: str) -> list[str]:
    return workshop.settings(
        root, f"run.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=1", f"checkpoint.url=file://{root}/copies",
        *more, url=teacher.url,
    )  # fmt: skip


def leftovers(root: Path) -> list[str]:
    return sorted(str(path) for pattern in LEFTOVERS for path in root.rglob(pattern))


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module: str, name: str, number: int) -> None:
    """Have the process die at the `number`-th call of a function."""
    owner = importlib.import_module(module)
    real, calls = getattr(owner, name), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            _die()
        return real(*arguments, **named)

    setattr(owner, name, counted)


def at_deletion() -> None:
    """Between the moment that an old checkpoint has its other name and its end."""
    real = shutil.rmtree

    def rmtree(path: Any, *arguments: Any, **named: Any) -> None:
        if Path(path).name.startswith(".deleted-"):
            _die()
        real(path, *arguments, **named)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def at_replacing() -> None:
    """With the new text of `latest` beside the old one."""
    real = Path.replace

    def replace(path: Path, target: Any) -> Path:
        if path.name == ".latest.new":
            _die()
        return real(path, target)

    Path.replace = replace  # type: ignore[method-assign]


# By what a save is at when the process dies.
STAGES: dict[str, Callable[[], None]] = {
    "a tensor file": partial(at_call, FILES, "save_tensors", 2),
    "the manifest": partial(at_call, FILES, "sync_folder", 2),
    "the name": partial(at_call, FILES, "make_way", 2),
    "latest": at_replacing,
    "an old one": at_deletion,
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_killed_save_leaves_is_swept_at_the_next_start(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path, stage: str, times: int
) -> None:
    left = 0
    for number in range(times):
        root = tmp_path / str(number)
        code = train(given(workshop, root, teacher), tmp_path / "killed.txt", prelude=STAGES[stage])
        assert code == -SIGKILL, (tmp_path / "killed.txt").read_text()
        left += len(leftovers(root))
        assert train(given(workshop, root, teacher), tmp_path / "next.txt") == 0, (tmp_path / "next.txt").read_text()
        assert leftovers(root) == []
        assert steps_of(root / "run") == list(range(1, STEPS + 1))
        assert "removed leftovers of killed processes from" in (tmp_path / "next.txt").read_text()
    assert left >= times, "the process died too early to leave anything"


@pytest.mark.parametrize("times", TIMES)
def test_what_a_killed_download_and_a_killed_upload_leave_is_swept(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path, times: int
) -> None:
    arguments = given(workshop, tmp_path, teacher, "run.allow_changes=run.steps")
    assert train([*arguments, "run.steps=4"], tmp_path / "first.txt") == 0
    whole = shutil.copytree(tmp_path / "copies", tmp_path / "kept")
    dying = partial(at_call, FILES, "verify", 1)
    for _ in range(times):
        shutil.rmtree(tmp_path / "run")
        assert train(arguments, tmp_path / "killed.txt", prelude=dying) == -SIGKILL
        assert [Path(path).name for path in leftovers(tmp_path)] == [".download-0-step-00000004"]
        # An upload that was cut short has no manifest.
        shutil.copytree(whole / "run" / "step-00000004", tmp_path / "copies" / "run" / "step-00000005")
        (tmp_path / "copies" / "run" / "step-00000005" / "manifest.json").unlink()
        assert train(arguments, tmp_path / "next.txt") == 0
        assert leftovers(tmp_path) == []
        assert [path.name for path in (tmp_path / "copies" / "run").iterdir()] == ["step-00000006"]
        shutil.rmtree(tmp_path / "copies")
        shutil.copytree(whole, tmp_path / "copies")


def test_a_damaged_checkpoint_put_aside_is_gone_after_the_next_start(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    arguments = given(workshop, tmp_path, teacher, "checkpoint.keep=2", "checkpoint.url=null")
    assert train(arguments, tmp_path / "first.txt") == 0
    (tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").write_bytes(b"")
    assert train(arguments, tmp_path / "second.txt") == 0
    assert [Path(path).name for path in leftovers(tmp_path)] == [f".damaged-step-{STEPS:08d}"]
    assert train(arguments, tmp_path / "third.txt") == 0
    assert leftovers(tmp_path) == []


def test_runs_that_share_a_root_and_a_second_trainer_of_one_run_remove_nothing_of_the_living(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    slow = given(workshop, tmp_path, teacher, "run.steps=100000", "checkpoint.every=100000", "checkpoint.url=null")
    with TrainerProcess(slow, tmp_path / "living.txt") as living:
        wait_for_step(tmp_path / "run", 1, living)
        # As it is in the middle of a save.
        busy = tmp_path / "run" / "checkpoints" / ".unfinished-step-00000001"
        busy.mkdir()
        assert train(given(workshop, tmp_path, teacher, "run.id=other"), tmp_path / "other.txt") == 0
        assert busy.exists()
        second = given(workshop, tmp_path, teacher, "run.steps=100000", "run.allow_changes=run.steps")
        with TrainerProcess(second, tmp_path / "second.txt") as intruder:
            while "another running process has locked" not in intruder.text:
                assert intruder.running, intruder.text
        assert busy.exists()


def test_a_folder_is_free_again_when_its_process_is_gone(tmp_path: Path) -> None:
    folder = RunFolder("run", tmp_path / "run")
    with ExitStack() as first:
        assert take(folder, first)
        with ExitStack() as second:
            assert not take(folder, second)
    (folder.checkpoints / ".deleted-step-00000001" / "inner").mkdir(parents=True)
    (folder.checkpoints / "step-00000002").mkdir()
    (folder.path / ".settings.yaml.new").write_text("")
    with ExitStack() as third:
        assert take(folder, third)
        assert sweep(folder) == [".settings.yaml.new", ".deleted-step-00000001"]
    assert (folder.checkpoints / "step-00000002").is_dir() and trace_of(folder.path) == []
