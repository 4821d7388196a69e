"""Loading the student that the settings name: from a model, an export, or an earlier run. Called by `build_components`
and `cli.export`.

`student.checkpoint_path` may be a run's folder: the student is built as that run built it, with the weights of its
newest checkpoint, so that training stages can be chained by path. Object store URLs are downloaded first.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from student_trainer.checkpoint import checkpoints as checkpoint
from student_trainer.checkpoint.fetched import on_this_disk
from student_trainer.checkpoint.files import Snapshot
from student_trainer.checkpoint.run_folder import SETTINGS_FILE
from student_trainer.settings import Settings, StudentSettings
from student_trainer.settings.student import AUTO
from student_trainer.students.folder import kind_of
from student_trainer.students.load import adapt, begin, check_cell, merged, quantised_student, student_from_model
from student_trainer.students.quantisers.record import read_record
from student_trainer.students.student import Student
from teacher_proto.process.stages import stage

log = logging.getLogger(__name__)


def load_student(settings: StudentSettings, device: torch.device) -> Student:
    """The student, float32 on `device`. ValueError if it can't be built."""
    with stage("loading the student"):
        return _load_student(settings, device)


def _load_student(settings: StudentSettings, device: torch.device) -> Student:
    check_cell(settings)
    settings = on_this_disk(settings)
    snapshot = earlier_run(settings.checkpoint_path)
    if snapshot is None:
        return student_from_model(settings, device)
    path, before = settings.checkpoint_path, settings_of(snapshot)
    if before.quantiser not in ("none", settings.quantiser):
        raise ValueError(
            f"{path} trained a student with quantiser {before.quantiser}, but student.quantiser is "
            f"{settings.quantiser}: its weights are not a full-precision model's; set "
            f"student.quantiser={before.quantiser}"
        )
    # Recursive: the earlier run may itself have started from a run, down to a model.
    student = _load_student(_as_trained(before, settings), device)
    checkpoint.restore_student(snapshot, student)
    if settings.quantiser != before.quantiser:
        # Full precision to few bits: adapters are merged into the weights before these are quantised.
        return quantised_student(merged(student), settings)
    _check_structure(student, settings)
    return begin(student.model, settings, _adapted(student, settings))


def recognised(settings: Settings) -> Settings:
    """The settings with architecture and quantiser, where they are "auto", set to those found in the student's folder.

    ValueError if there is no folder to inspect.
    """
    student = settings.student
    if AUTO not in (student.architecture, student.quantiser):
        return settings
    if not (path := on_this_disk(student).checkpoint_path):
        raise ValueError("student.type=auto needs student.checkpoint_path: set it to a folder or a hub name")
    try:
        if (snapshot := earlier_run(path)) is not None:
            before = settings_of(snapshot)
            architecture, quantiser, words = before.architecture, before.quantiser, f"a run with {before.cell}"
        else:
            architecture, quantiser, words = kind_of(path, student.revision, student.diffusion)
    except OSError as error:
        raise ValueError(f"student.checkpoint_path={path}: {str(error).strip().splitlines()[0]}") from None
    found = {"architecture": architecture, "quantiser": quantiser}
    changes = {name: value for name, value in found.items() if getattr(student, name) == AUTO}
    taken = " ".join(f"student.{name}={value}" for name, value in changes.items())
    log.info("student.type=auto: %s is %s: %s", path, words, taken)
    return settings.model_copy(update={"student": student.model_copy(update=changes)})


def earlier_run(path: str) -> Snapshot | None:
    """The newest checkpoint of the run in `path`; None if that is no run's folder. ValueError if there is none yet."""
    if not path or not (Path(path) / SETTINGS_FILE).is_file():
        return None
    snapshot = checkpoint.newest(Path(path) / "checkpoints")
    if snapshot is None:
        raise ValueError(f"{path} is the folder of a run that has saved no checkpoint yet")
    return snapshot


def settings_of(snapshot: Snapshot) -> StudentSettings:
    """The student settings stored in a run's checkpoint."""
    return StudentSettings.model_validate(snapshot.state["settings"]["student"])


def model_behind(settings: StudentSettings) -> StudentSettings:
    """The settings of the first run in a chain, which started from a model: that model's folder has the tokenizer."""
    settings = on_this_disk(settings)
    snapshot = earlier_run(settings.checkpoint_path)
    return settings if snapshot is None else model_behind(settings_of(snapshot))


def _as_trained(before: StudentSettings, settings: StudentSettings) -> StudentSettings:
    """The earlier run's student settings with the current compute settings. Gradient checkpointing and compilation are
    off; `begin` applies the current ones.
    """
    changes: dict[str, Any] = {name: getattr(settings, name) for name in ("compute", "attention")}
    return before.model_copy(update={**changes, "gradient_checkpointing": False, "compile": False})


def _adapted(student: Student, settings: StudentSettings) -> StudentSettings | None:
    """The settings that the student's adapter was made with. An adapter is added here if the earlier run had none.

    ValueError if the settings request a different adapter than the one it was trained with.
    """
    had = student.adapted
    if had is None:
        return adapt(student.model, settings)
    if settings.adapter_name != "none" and had.adapter_settings != settings.adapter_settings:
        raise ValueError(
            f"{settings.checkpoint_path} trained an adapter {had.adapter_name} with {had.adapter_settings!r}, but the "
            f"settings request {settings.adapter_name} with {settings.adapter_settings!r}: leave the adapter's "
            "settings out to continue training the saved one"
        )
    return had


def _check_structure(student: Student, settings: StudentSettings) -> None:
    """ValueError if the settings would quantise a student differently from how it was trained."""
    record = read_record(student.model.config)
    if record is None:
        return
    if different := next(record.differing(settings.quantisation.of_layers), None):
        name, was, asked = different
        raise ValueError(
            f"student.quantisation.{name} is {asked}, but {settings.checkpoint_path} was trained with {was}: leave it "
            "out"
        )
