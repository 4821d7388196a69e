"""Muon for hidden matrices, AdamW for all else. Called by `optimizer`; QK-clip goes with it, see `qk_clip`.

Muon (Jordan; at scale arXiv 2502.16982) steps along the momentum's nearest orthogonal matrix, found with five
Newton-Schulz iterations. With `match_rms_adamw` an update is 0.2 sqrt(max(rows, columns)) times that matrix, about as
large as AdamW's, so both take the same rates and decays. A student that was pre-trained with AdamW need not gain by it
(section 3.5 there): `adamw` is the default.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from student_trainer.optim.adamw import build_adamw
from student_trainer.optim.groups import ParameterGroup, slots
from student_trainer.optim.sharded_muon import ShardedMuon
from student_trainer.settings import OptimSettings

log = logging.getLogger(__name__)


def build_muon_clip(
    settings: OptimSettings, groups: Sequence[ParameterGroup]
) -> list[tuple[torch.optim.Optimizer, Sequence[ParameterGroup]]]:
    """torch's Muon, or ours over shards, for the two-dimensional weights of the group `matrices`, AdamW for the rest.

    Matrices that the model keeps stacked in more dimensions (experts, convolutions) go to AdamW, which is logged.
    ValueError for a student without hidden matrices that train.
    """
    hidden, rest = _parted(groups)
    if not hidden.parameters:
        raise ValueError("optim.kind is muon_clip, but the student has no hidden matrices that train: take adamw")
    sharded = any(isinstance(parameter, DTensor) for parameter in hidden.parameters.values())
    muon = (ShardedMuon if sharded else torch.optim.Muon)(
        slots(settings, [hidden]), momentum=settings.muon.momentum, nesterov=settings.muon.nesterov,
        ns_steps=settings.muon.newton_schulz_steps, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return [(muon, [hidden]), *(build_adamw(settings, rest) if rest else [])]


def _parted(groups: Sequence[ParameterGroup]) -> tuple[ParameterGroup, list[ParameterGroup]]:
    """What Muon takes, and what is left in its groups."""
    hidden, rest = ParameterGroup("matrices", {}), []
    for group in groups:
        if group.name != "matrices":
            rest.append(group)
            continue
        stacked = ParameterGroup("matrices", {})
        for name, parameter in group.parameters.items():
            (hidden if parameter.ndim == 2 else stacked).parameters[name] = parameter
        if stacked.parameters:
            log.warning("AdamW steps what is no plain matrix: %s", ", ".join(stacked.parameters))
            rest.append(stacked)
    return hidden, rest
