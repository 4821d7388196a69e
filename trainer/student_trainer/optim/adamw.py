"""AdamW for any parameters. Called by `optimizer`, and by `muon_clip` for the parameters that Muon does not take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from student_trainer.optim.groups import ParameterGroup, slots
from student_trainer.settings import OptimSettings


def build_adamw(
    settings: OptimSettings, groups: Sequence[ParameterGroup]
) -> list[tuple[torch.optim.Optimizer, Sequence[ParameterGroup]]]:
    """AdamW with decoupled decay (arXiv 1711.05101); each group has its own rate and decay.

    Fused: parameter, gradient and both moments are read once, and no temporary array of their size is made.
    """
    optimizer = torch.optim.AdamW(slots(settings, groups), betas=settings.betas, eps=settings.eps, fused=True)
    return [(optimizer, groups)]
