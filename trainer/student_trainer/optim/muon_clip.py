"""Muon for hidden matrices, AdamW for everything else. Called by `optimizer`; QK-clip goes with it, see `qk_clip`.

Muon (Jordan; at scale arXiv 2502.16982) steps along the orthogonal matrix nearest to the momentum, found with
Newton-Schulz iterations, five by default. With `match_rms_adamw` an update is 0.2 sqrt(max(rows, columns)) times that
matrix, about as large as AdamW's, so both take the same rates and decays. A student that was pretrained with AdamW need
not benefit (section 3.5 there): `adamw` is the default.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from student_trainer.optim.adamw import build_adamw
from student_trainer.optim.groups import ParameterGroup, slots
from student_trainer.settings import OptimSettings

log = logging.getLogger(__name__)


def build_muon_clip(
    settings: OptimSettings, groups: Sequence[ParameterGroup]
) -> list[tuple[torch.optim.Optimizer, Sequence[ParameterGroup]]]:
    """torch's Muon, or ours for shards, for the two-dimensional weights of the group `matrices`; AdamW for the rest.

    Matrices that the model keeps stacked in more dimensions (experts, convolutions) go to AdamW, which is logged.
    ValueError for a student without trainable hidden matrices.
    """
    hidden, rest = _parted(groups)
    if not hidden.parameters:
        raise ValueError("optim.kind is muon_clip, but the student has no trainable hidden matrices: use adamw")
    sharded = any(isinstance(parameter, DTensor) for parameter in hidden.parameters.values())
    muon = (ShardedMuon if sharded else torch.optim.Muon)(
        slots(settings, [hidden]), momentum=settings.muon.momentum, nesterov=settings.muon.nesterov,
        ns_steps=settings.muon.newton_schulz_steps, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return [(muon, [hidden]), *(build_adamw(settings, rest) if rest else [])]


def _parted(groups: Sequence[ParameterGroup]) -> tuple[ParameterGroup, list[ParameterGroup]]:
    """The group that Muon takes, and the groups of the rest."""
    hidden, rest = ParameterGroup("matrices", {}), []
    for group in groups:
        if group.name != "matrices":
            rest.append(group)
            continue
        stacked = ParameterGroup("matrices", {})
        for name, parameter in group.parameters.items():
            (hidden if parameter.ndim == 2 else stacked).parameters[name] = parameter
        if stacked.parameters:
            log.warning("using AdamW for parameters that are not plain matrices: %s", ", ".join(stacked.parameters))
            rest.append(stacked)
    return hidden, rest


class ShardedMuon(torch.optim.Muon):
    """torch's update for sharded parameters, where one rank computes each orthogonal matrix for all. Takes
    torch.optim.Muon's arguments, and parameters that are sharded over one mesh (FSDP2). All ranks call `step`.

    Newton-Schulz needs the full matrix. As many matrices as there are ranks are taken at a time: each is gathered in
    bfloat16, in which the iteration runs; rank i makes the i-th orthogonal and distributes its shards. Momentum, decay
    and step stay sharded. Every element goes through the operations of torch.optim.Muon, so the update is the same, bit
    for bit.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None, "the loop computes the loss, not a closure"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            # As many matrices at a time as there are ranks: each rank has one to make orthogonal, and none idles.
            ranks = parameters[0].device_mesh.size() if parameters else 1
            for first in range(0, len(parameters), ranks):
                some = parameters[first : first + ranks]
                updates = _orthogonal([self._direction(parameter, group) for parameter in some], group)
                for parameter, update in zip(some, updates, strict=True):
                    # Decoupled decay first, then the step: the order of torch.optim.Muon.
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    # match_rms_adamw: an update about as large as AdamW's.
                    parameter.add_(update, alpha=-(group["lr"] * (0.2 * math.sqrt(max(parameter.shape)))))

    def _direction(self, parameter: DTensor, group: dict[str, Any]) -> DTensor:
        """Updates the momentum with the gradient; returns what the step makes orthogonal."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        momentum = state["momentum_buffer"]
        # m <- mu m + (1 - mu) g; Nesterov looks one step ahead: (1 - mu) g + mu m.
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def _orthogonal(matrices: list[DTensor], group: dict[str, Any]) -> list[DTensor]:
    """The orthogonal matrix of each matrix in bfloat16, sharded in the same way; at most as many as there are ranks."""
    mesh = matrices[0].device_mesh
    # All ranks must gather all of them, in the same order; a rank uses only its own.
    wholes = [matrix.bfloat16().full_tensor() for matrix in matrices]
    rank = mesh.get_local_rank()
    if rank < len(wholes):
        wholes[rank] = newton_schulz(wholes[rank], group["ns_coefficients"], group["ns_steps"], group["eps"])
    # Of the other ranks' full matrices only the shape is used.
    return [
        distribute_tensor(whole, mesh, matrix.placements, src_data_rank=owner)
        for owner, (whole, matrix) in enumerate(zip(wholes, matrices, strict=True))
    ]


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximately the nearest orthogonal matrix, by Jordan's quintic iteration (kellerjordan.github.io/posts/muon):
    X <- aX + (bA + cA^2) X with A = X X^T, starting from X of norm 1, on the shorter side.
    """
    # An odd polynomial of X: its singular vectors stay, and each singular value s becomes a s + b s^3 + c s^5, which
    # brings all of them to about 1 in five rounds.
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    # The Frobenius norm bounds the largest singular value, and the iteration converges from at most 1.
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        # On the shorter side, so that the Gram matrix is the smaller of the two.
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).contiguous()
