"""The student that the settings name: out of a model, an export, or an earlier run. Called by `build` and `export`.

`student.checkpoint_path` may be the folder of a run: its student is built as that run built it and takes the weights
of its newest checkpoint. So one stage of training follows another by a path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from student_trainer.checkpoint import checkpoints as checkpoint
from student_trainer.checkpoint.files import Snapshot
from student_trainer.checkpoint.run_folder import SETTINGS_FILE
from student_trainer.settings import StudentSettings
from student_trainer.students.architectures import wrap
from student_trainer.students.bitnet import CONFIG_ENTRY
from student_trainer.students.bitnet_student import load_bitnet, make_ternary
from student_trainer.students.causal import attention_for
from student_trainer.students.lora import add_lora, merge_lora
from student_trainer.students.student import Student
from teacher_proto.stages import stage


def load_causal(settings: StudentSettings, device: torch.device) -> Student:
    """The student of `settings.checkpoint_path`, float32 on `device`. ValueError says why one can't be had."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not settings.checkpoint_path:
        raise ValueError("student.checkpoint_path must be given: a folder or hub name of a Hugging Face causal model")
    attention = attention_for(settings, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.checkpoint_path, revision=settings.revision, dtype=torch.float32, trust_remote_code=False,
            use_safetensors=True, attn_implementation="flex_attention" if attention == "flex" else "sdpa",
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ValueError(f"student.checkpoint_path={settings.checkpoint_path}: {_first_line(error)}") from None
    if settings.lora.rank is not None:
        add_lora(model, settings.lora)
    return wrap(model.to(device), attention, settings)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


KINDS: Mapping[str, Callable[[StudentSettings, torch.device], Student]] = {
    "causal": load_causal,
    "bitnet": load_bitnet,
}


def load_student(settings: StudentSettings, device: torch.device) -> Student:
    """The student, float32 on `device`. ValueError says why one can't be had."""
    with stage("loading the student"):
        return _load_student(settings, device)


def _load_student(settings: StudentSettings, device: torch.device) -> Student:
    snapshot = earlier_run(settings.checkpoint_path)
    if snapshot is None:
        return KINDS[settings.kind](settings, device)
    before = settings_of(snapshot)
    if settings.kind == "causal" and before.kind != "causal":
        raise ValueError(
            f"{settings.checkpoint_path} trained a student of kind {before.kind}, student.kind is causal: its weights "
            f"are not a full-precision model's; choose student={before.kind}"
        )
    student = load_student(_as_trained(before, settings), device)
    checkpoint.restore_student(snapshot, student)
    if settings.kind != before.kind:
        return make_ternary(merge_lora(student.model), settings)
    _check_structure(student, settings)
    student.before_step(0)
    return student


def earlier_run(path: str) -> Snapshot | None:
    """The newest checkpoint of the run in the folder `path`; None if it is no run's. ValueError if there is none."""
    if not path or not (Path(path) / SETTINGS_FILE).is_file():
        return None
    snapshot = checkpoint.newest(Path(path) / "checkpoints")
    if snapshot is None:
        raise ValueError(f"{path} is the folder of a run that has saved no checkpoint yet")
    return snapshot


def settings_of(snapshot: Snapshot) -> StudentSettings:
    """The student's settings in a run's checkpoint."""
    return StudentSettings.model_validate(snapshot.state["settings"]["student"])


def model_behind(settings: StudentSettings) -> StudentSettings:
    """The settings of the run that began with a model, at the end of a chain of runs: where the tokenizer is."""
    snapshot = earlier_run(settings.checkpoint_path)
    return settings if snapshot is None else model_behind(settings_of(snapshot))


def _as_trained(before: StudentSettings, settings: StudentSettings) -> StudentSettings:
    """The student as it was trained before, to be computed and warmed up as is wanted now."""
    changes: dict[str, Any] = {name: getattr(settings, name) for name in ("compute", "attention")}
    if settings.kind == before.kind:
        changes |= {name: getattr(settings, name) for name in ("gradient_checkpointing", "compile")}
    changes["bitnet"] = before.bitnet.model_copy(update={"warmup_steps": settings.bitnet.warmup_steps})
    return before.model_copy(update=changes)


def _check_structure(student: Student, settings: StudentSettings) -> None:
    """ValueError where a ternary student is asked to be ternary in another way than it was trained."""
    for name, was in getattr(student.model.config, CONFIG_ENTRY, {}).items():
        asked = getattr(settings.bitnet, name)
        if asked is not None and asked != was:
            raise ValueError(
                f"student.bitnet.{name} is {asked}, {settings.checkpoint_path} was trained with {was}: leave it out"
            )
