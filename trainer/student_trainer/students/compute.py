"""The dtype of a student's forward pass: what `student.compute` means on this hardware. Called by `build`, `causal` and
`checkpoint.run_folder`.

What `auto` resolves to is written into the run's settings, so that a run that is resumed computes as it began, on any
hardware.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from student_trainer.ranks import Ranks
from student_trainer.settings import Settings
from teacher_proto.hardware import auto_dtype, cpu_name, emulation_warning

logger = logging.getLogger(__name__)


def compute_dtype(compute: str, device: torch.device) -> torch.dtype:
    """The dtype that `student.compute` names, or what "auto" means on `device`."""
    if compute == "auto":
        return auto_dtype(device)
    dtype: torch.dtype = getattr(torch, compute)
    return dtype


def as_begun(settings: Settings, before: Mapping[str, Any]) -> Settings:
    """`settings` with the dtype of the run that is resumed, whose settings are `before`, unless they name one."""
    if settings.student.compute != "auto":
        return settings
    return _computing_in(settings, before["student"]["compute"])


def name_compute(settings: Settings, device: torch.device, ranks: Ranks) -> Settings:
    """`settings` with a dtype in place of "auto", rank 0's on all ranks; logs which one, and whether it is emulated."""
    name = ranks.from_first(str(compute_dtype(settings.student.compute, device)).removeprefix("torch."))
    dtype = compute_dtype(name, device)
    logger.info("the student computes in %s on %s", name, _device_name(device))
    if warning := emulation_warning(dtype, device):
        logger.warning("student.compute: %s", warning)
    return _computing_in(settings, name)


def _computing_in(settings: Settings, name: str) -> Settings:
    student = settings.student.model_copy(update={"compute": name})
    return settings.model_copy(update={"student": student})


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{device} ({name})"
