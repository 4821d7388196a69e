"""The dtype that a student computes in: the hardware's, said at the start, and kept by a run that goes on elsewhere."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from student_trainer import loop
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.settings import StudentSettings
from teacher_proto import hardware
from tests.trainer_run import ScriptedTargets, Workshop, final_files, run_here, trace_of

CPU = torch.device("cpu")


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch):
    """Makes this machine one that computes in bfloat16, or one that does not."""

    def make(bfloat16: bool) -> None:
        monkeypatch.setattr(hardware, "_computes", lambda dtype, device: dtype == torch.float32 or bfloat16)

    return make


@pytest.mark.parametrize(("bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_what_the_hardware_computes_in(workshop: Workshop, able, bfloat16, dtype) -> None:
    able(bfloat16)
    student = load_student(StudentSettings(checkpoint_path=str(workshop.student)), CPU)
    assert student.compute == dtype
    assert {tensor.dtype for tensor in student.tensors().values()} == {torch.float32}


def run(workshop: Workshop, root: Path, *overrides: str) -> Path:
    assert run_here(workshop.settings(root, *overrides), ScriptedTargets()) == loop.DONE
    return root / "run"


def begin_again_at_step_4(folder: Path, root: Path) -> None:
    shutil.copytree(folder, root / "run")
    for step in (8, 12):
        shutil.rmtree(root / "run" / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize(("begins", "goes_on"), [(False, True), (True, False)])
def test_a_run_goes_on_in_what_it_began_with_bit_for_bit_on_other_hardware(
    workshop: Workshop, able, tmp_path: Path, caplog: pytest.LogCaptureFixture, begins, goes_on
) -> None:
    name = "bfloat16" if begins else "float32"
    able(begins)
    with caplog.at_level(logging.INFO):
        straight = run(workshop, tmp_path / "straight", "student.compute=auto", "checkpoint.keep=5")
    assert f"the student computes in {name} on cpu" in caplog.text
    assert yaml.safe_load((straight / "settings.yaml").read_text())["student"]["compute"] == name

    able(goes_on)
    begin_again_at_step_4(straight, tmp_path / "again")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = run(workshop, tmp_path / "again", "student.compute=auto", "checkpoint.keep=5")
    assert "resumed at step 4" in caplog.text and "resumed with a change" not in caplog.text
    assert ("is emulated" in caplog.text) == (begins and not goes_on)
    assert trace_of(again) == trace_of(straight)
    assert final_files(again, 12) == final_files(straight, 12)


def test_a_dtype_that_is_given_on_resume_is_taken_and_warned_of(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = run(workshop, tmp_path / "straight", "student.compute=float32", "checkpoint.keep=5")
    begin_again_at_step_4(straight, tmp_path / "again")
    again = run(workshop, tmp_path / "again", "student.compute=bfloat16", "checkpoint.keep=5")
    assert "student.compute: float32 in the checkpoint, bfloat16 now" in caplog.text
    assert final_files(again, 12) != final_files(straight, 12)
