"""Makes a student of a model, with an architecture, a quantiser and an adapter, each by its name in a dict. Called by
`checkpoint.earlier_run`, which also knows the runs that a student may come from.

A model is loaded (or quantised as it is loaded), adapted, and made a student, in this order. All combinations are
allowed, except those in REFUSED.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from student_trainer.settings import StudentSettings
from student_trainer.settings.student import NO_STUDENT
from student_trainer.students import flex
from student_trainer.students.adapters.adapter import Adapter
from student_trainer.students.adapters.lora import LORA
from student_trainer.students.adapters.low_rank import check_start, corrections
from student_trainer.students.adapters.lrc import LRC_ADAPTER
from student_trainer.students.adapters.none import NO_ADAPTER
from student_trainer.students.causal import attention_for, wrap_causal
from student_trainer.students.diffusion import wrap_diffusion
from student_trainer.students.diffusion_record import read_diffusion
from student_trainer.students.folder import read_config
from student_trainer.students.pretrained import load_quantised, refuse_quantised
from student_trainer.students.quant_linear import is_quantised, quantise, set_quantisation_blend
from student_trainer.students.quantisers import QUANTISERS
from student_trainer.students.student import Student

# By `student.architecture`: how the student reads a batch, and how its model computes hidden states of that. Given the
# model (loaded, quantised and adapted, on its device), "flex" or "sdpa", and the settings.
ARCHITECTURES: dict[str, Callable[[Any, str, StudentSettings], Student]] = {
    "causal": wrap_causal,
    "diffusion": wrap_diffusion,
}
# By `student.adapter`. QUANTISERS is a dict like it, where its own users find it.
ADAPTERS: Mapping[str, Adapter] = {"none": NO_ADAPTER, "lora": LORA, "lrc": LRC_ADAPTER}
# (architecture, quantiser, adapter), "*" for any of them, to the reason why such a student makes no sense.
REFUSED: Mapping[tuple[str, str, str], str] = {
    ("*", "none", "lrc"): "lrc corrects the error of quantised layers; choose a quantiser, or student.adapter=lora",
}


def check_cell(settings: StudentSettings) -> None:
    """ValueError for a name that is in no dict, and for a combination that is refused."""
    cell = (settings.architecture, settings.quantiser, settings.adapter_name)
    parts = (("architecture", ARCHITECTURES), ("quantiser", QUANTISERS), ("adapter", ADAPTERS))
    for (part, known), name in zip(parts, cell, strict=True):
        if name not in known:
            raise ValueError(f"student.{part} is {name}, expected one of: {', '.join(sorted(known))}")
    for refused, reason in REFUSED.items():
        if all(part in ("*", name) for part, name in zip(refused, cell, strict=True)):
            raise ValueError(f"a student with {settings.cell} is not supported: {reason}")


def student_from_model(settings: StudentSettings, device: torch.device) -> Student:
    """A student of the model at `settings.checkpoint_path`, float32 on `device`. ValueError if it can't be one."""
    check_cell(settings)
    if not settings.checkpoint_path:
        raise ValueError(NO_STUDENT)
    model = _load_model(settings, attention_for(settings, device))
    # The adapter before the architecture: its layers are compiled and checkpointed with the others.
    return begin(model.to(device), settings, adapt(model, settings))


def quantised_student(model: Any, settings: StudentSettings) -> Student:
    """A full-precision model, quantised in place, as a student."""
    quantise(model, settings.quantiser, **settings.quantisation.of_layers)
    return begin(model, settings, adapt(model, settings))


def adapt(model: Any, settings: StudentSettings) -> StudentSettings | None:
    """Put the settings' adapter into the model. Returns the settings, None if they name none."""
    if settings.adapter_name == "none":
        return None
    if corrections(model):
        raise ValueError(
            f"{settings.checkpoint_path} holds an adapter, which is trained further: leave out student.adapter and "
            "student.lora"
        )
    ADAPTERS[settings.adapter_name].add(model, settings)
    return settings


def begin(model: Any, settings: StudentSettings, adapted: StudentSettings | None) -> Student:
    """A model as a student at the beginning of its warm-up. `adapted`: the settings of its adapter, or None."""
    if settings.architecture == "causal" and read_diffusion(model.config, settings.checkpoint_path) is not None:
        raise ValueError(
            f"{settings.checkpoint_path} holds a block-diffusion student, but student.architecture is causal: set "
            "student.architecture=diffusion"
        )
    if is_quantised(model):
        # The head is checked unquantised: where int8 rounding meets a tie, the last bit of a sum changes logits by
        # several per cent.
        set_quantisation_blend(model, 0.0)
    check_start(model)
    student = ARCHITECTURES[settings.architecture](model, attention_for(settings, model.device), settings)
    student.warmup_steps, student.adapted = settings.quantisation.warmup_steps, adapted
    student.before_step(0)
    return student


def merged(student: Student) -> Any:
    """The student's model with its adapter merged into its weights. ValueError if that would change its function."""
    return student.model if student.adapted is None else ADAPTERS[student.adapted.adapter_name].merge(student.model)


def _load_model(settings: StudentSettings, attention: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    path = settings.checkpoint_path
    implementation = flex.IMPLEMENTATION if attention == "flex" else "sdpa"
    try:
        config = read_config(path, settings.revision, settings.diffusion)
        if settings.quantiser == "none":
            refuse_quantised(config, path)
            return AutoModelForCausalLM.from_pretrained(
                path, config=config, revision=settings.revision, dtype=torch.float32, trust_remote_code=False,
                use_safetensors=True, attn_implementation=implementation,
            )  # fmt: skip
        return load_quantised(
            path, settings.quantiser, revision=settings.revision, attn_implementation=implementation, config=config,
            **settings.quantisation.of_layers,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ValueError(f"student.checkpoint_path={path}: {str(error).strip().splitlines()[0]}") from None
