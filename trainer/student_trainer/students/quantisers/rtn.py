"""Round-to-nearest, as in post-training quantisation: integers between the smallest and the largest weight of a row, or
of a group of it. One of `QUANTISERS`; by default without quantised activations or added norms.

step = (max - min) / (2^bits - 1), zero = round(-min / step), codes = clip(round(W / step) + zero, 0, 2^bits - 1), value
(codes - zero) step. Every range includes 0, so that 0 is representable. Computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.students.quantisers.quantiser import Quantiser
from student_trainer.students.quantisers.record import Record

DEFAULT_BITS = 4
STEP_BITS = 16  # of a step when packed


def round_to_nearest(weight_OI: Tensor, bits: int, group_size: int | None) -> Tensor:
    """The weight rounded to its grid, float32."""
    latent_OI = weight_OI.detach().float()
    latent_OGg = latent_OI.unflatten(1, (-1, group_size or latent_OI.shape[1]))
    top = 2**bits - 1
    low_OG1, high_OG1 = latent_OGg.aminmax(dim=-1, keepdim=True)
    # The grid holds 0, so that weights of 0 stay 0.
    low_OG1, high_OG1 = low_OG1.clamp_max(0.0), high_OG1.clamp_min(0.0)
    step_OG1 = ((high_OG1 - low_OG1) / top).clamp_min(torch.finfo(torch.float32).tiny)
    # The code whose value is 0: code = round(w / step) + zero, value = (code - zero) step.
    zero_OG1 = (-low_OG1 / step_OG1).round_()
    codes_OGg = (latent_OGg / step_OG1).round_().add_(zero_OG1).clamp_(0, top)
    return codes_OGg.sub_(zero_OG1).mul_(step_OG1).flatten(1)


class _RoundedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, blend_: Tensor, bits: int, group_size: int | None) -> Tensor:
        value_OI = round_to_nearest(weight_OI, bits, group_size)
        return torch.lerp(weight_OI.float(), value_OI, blend_.float(), out=value_OI).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


class RoundToNearest(Quantiser):
    name = "rtn"
    grouped = True
    exports = frozenset({"hf", "dense"})

    def __init__(self, bits: int = DEFAULT_BITS, group_size: int | None = None) -> None:
        self.bits, self.group_size = bits, group_size

    def of(self, record: Record) -> RoundToNearest:
        return RoundToNearest(record.bits or DEFAULT_BITS, record.group_size)

    def check(self, linear: nn.Linear) -> str:
        if self.group_size is None or linear.in_features % self.group_size == 0:
            return ""
        return (
            f"{linear.in_features} inputs wide, which student.quantisation.group_size={self.group_size} does not "
            "divide: use one that does, or null for one step per row"
        )

    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        return _RoundedWeight.apply(layer.weight, blend_, int(self.bits), self.group_size)

    def stored_bits(self, out_features: int, in_features: int) -> float:
        # A group has a step of 16 bits, and a zero of as many bits as a code.
        return self.bits + (STEP_BITS + self.bits) / (self.group_size or in_features)


RTN = RoundToNearest()
