"""`student=bitnet`: a causal student whose decoder is ternary, and whose quantisation warms up. Called by `load`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from student_trainer.settings import StudentSettings
from student_trainer.students.architectures import wrap
from student_trainer.students.bitnet import convert_to_bitnet, set_quantisation_blend, warmup_blend
from student_trainer.students.bitnet_checkpoint import load_bitnet_student
from student_trainer.students.causal import attention_for
from student_trainer.students.student import Student


@dataclass(eq=False)
class BitNetStudent(Student):
    """The blend of exact and quantised is a buffer of the model: checkpoints keep it, and a resumed run goes on."""

    warmup_steps: int = 0

    def before_step(self, number: int) -> None:
        """Step `number` (from 0) of the warm-up; afterwards the student is fully quantised."""
        set_quantisation_blend(self.model, warmup_blend(number, self.warmup_steps))


def load_bitnet(settings: StudentSettings, device: torch.device) -> Student:
    """The ternary student of `settings.checkpoint_path`, float32 on `device`. ValueError says why one can't be had."""
    ternary, attention = settings.bitnet, attention_for(settings, device)
    if not settings.checkpoint_path:
        raise ValueError("student.checkpoint_path must be given: a folder or hub name of a Hugging Face causal model")
    try:
        model = load_bitnet_student(
            settings.checkpoint_path, revision=settings.revision, sub_norm=ternary.sub_norm, eps=ternary.eps,
            quantise_activations=ternary.quantise_activations,
            attn_implementation="flex_attention" if attention == "flex" else "sdpa",
        )  # fmt: skip
    except OSError as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"student.checkpoint_path={settings.checkpoint_path}: {line}") from None
    return wrap_bitnet(model.to(device), settings)


def make_ternary(model: Any, settings: StudentSettings) -> Student:
    """A full-precision model, converted in place."""
    ternary = settings.bitnet
    convert_to_bitnet(
        model, sub_norm=ternary.sub_norm or "output", quantise_activations=ternary.quantise_activations is not False,
        eps=ternary.eps,
    )  # fmt: skip
    return wrap_bitnet(model, settings)


def wrap_bitnet(model: Any, settings: StudentSettings) -> Student:
    """A ternary model as a student that stands at the beginning of its warm-up."""
    # The head is checked unquantised: where int8 rounding meets a tie, the last bit of a sum moves logits by per cents.
    set_quantisation_blend(model, 0.0)
    wrapped = wrap(model, attention_for(settings, model.device), settings)
    student = BitNetStudent(
        **{field.name: getattr(wrapped, field.name) for field in fields(wrapped)},
        warmup_steps=settings.bitnet.warmup_steps,
    )
    student.before_step(0)
    return student
