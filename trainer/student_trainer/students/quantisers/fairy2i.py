"""Fairy2i (arXiv 2512.02901): a real weight as two complex ones, of 1, i, -1 and -i times scales. One of `QUANTISERS`;
`export` packs what `planes` gives, and `dense` reads it.

A real matrix of even sides, in blocks A11, A12, A21, A22, is the map y = U x + W conj(x) of half as many complex
numbers, with U = (A11 + A22)/2 + i (A21 - A12)/2 and W = (A11 - A22)/2 + i (A12 + A21)/2. Every entry of U and of W
becomes its nearest direction, the real ones worth the mean |Re| of those entries, the imaginary ones the mean |Im|. A
second stage does the same with what the first one left. Computed in float32; activations are not rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.students.quantisers.quantiser import Quantiser, exact
from student_trainer.students.quantisers.record import Record

# Of an axis that no entry points along, as the released code has it.
SMALLEST_SCALE = 1e-6


def complex_form(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """U and W [O/2, I/2] in complex128, in which the sums and differences of float32 numbers are exact, or nearly."""
    part_PUOI = _doubled_parts(weight_OI.double()) / 2
    return torch.complex(part_PUOI[0, 0], part_PUOI[1, 0]), torch.complex(part_PUOI[0, 1], part_PUOI[1, 1])


def real_form(u_OI: Tensor, w_OI: Tensor) -> Tensor:
    """The real weight [O, I] of U and W [O/2, I/2]."""
    return _real(torch.stack((torch.stack((u_OI.real, w_OI.real)), torch.stack((u_OI.imag, w_OI.imag)))))


def planes(weight_OI: Tensor, stages: int) -> tuple[Tensor, Tensor]:
    """Codes k of the directions i^k, uint8 [stages, 2, O/2, I/2] of U and of W, and what a real and an imaginary
    direction are worth, [stages, 2 of U and W, 2].
    """
    left_PUOI = _doubled_parts(exact(weight_OI.detach()))
    codes, scales = [], []
    for _ in range(stages):
        kept_PUOI, scale_PU11 = _nearest(left_PUOI)
        negative = torch.signbit(left_PUOI)
        codes.append(torch.where(kept_PUOI[0] > 0, 2 * negative[0], 1 + 2 * negative[1]).to(torch.uint8))
        scales.append(scale_PU11.reshape(2, 2).T)
        left_PUOI.sub_(torch.copysign(kept_PUOI.mul_(scale_PU11), left_PUOI), alpha=2)
    return torch.stack(codes), torch.stack(scales)


def dense(codes_SUOI: Tensor, scales_SUP: Tensor) -> Tensor:
    """The real weight [O, I] that the outcome of `planes` stands for, to the bit what a layer multiplies by."""
    part_PUOI = scales_SUP.new_zeros(2, *codes_SUOI.shape[1:])
    for codes_UOI, scales_UP in zip(codes_SUOI, scales_SUP, strict=True):
        sign_UOI = torch.where(codes_UOI >= 2, -1.0, 1.0).to(scales_UP.dtype)
        imaginary_UOI = codes_UOI % 2 == 1
        for axis, chosen in enumerate((~imaginary_UOI, imaginary_UOI)):
            part_PUOI[axis] += chosen * sign_UOI * scales_UP[:, axis, None, None]
    return _real(part_PUOI)


def _doubled_parts(weight_OI: Tensor) -> Tensor:
    """Twice the real parts of U and W, and twice their imaginary parts: a new tensor [2, 2, O/2, I/2]."""
    rows, columns = weight_OI.shape
    part_PUOI = weight_OI.new_empty(2, 2, rows // 2, columns // 2)
    (a11, a12), (a21, a22) = weight_OI.view(2, rows // 2, 2, columns // 2).transpose(1, 2)
    torch.add(a11, a22, out=part_PUOI[0, 0])
    torch.sub(a11, a22, out=part_PUOI[0, 1])
    torch.sub(a21, a12, out=part_PUOI[1, 0])
    torch.add(a21, a12, out=part_PUOI[1, 1])
    return part_PUOI


def _real(part_PUOI: Tensor) -> Tensor:
    """The real weight [O, I] of real parts of U and W, and imaginary ones: the inverse of `_doubled_parts`, halved."""
    (u_re, w_re), (u_im, w_im) = part_PUOI
    weight_OI = part_PUOI.new_empty(2 * u_re.shape[0], 2 * u_re.shape[1])
    (a11, a12), (a21, a22) = weight_OI.view(2, u_re.shape[0], 2, u_re.shape[1]).transpose(1, 2)
    torch.add(u_re, w_re, out=a11)
    torch.sub(w_im, u_im, out=a12)
    torch.add(u_im, w_im, out=a21)
    torch.sub(u_re, w_re, out=a22)
    return weight_OI


def _nearest(doubled_PUOI: Tensor) -> tuple[Tensor, Tensor]:
    """For both axes: 1 where an entry's nearest direction lies along it and 0 elsewhere, and what it is worth.

    The sector of +1 is [-pi/4, pi/4): of the edges, where both parts are as large, those of unlike signs are real.
    """
    size_PUOI = doubled_PUOI.abs()
    real_UOI = (size_PUOI[0] > size_PUOI[1]) | (doubled_PUOI[0] == -doubled_PUOI[1])
    kept_PUOI = torch.stack((real_UOI, ~real_UOI)).to(doubled_PUOI.dtype)
    # Exact up to 2^24, and as a sum of floats many times faster than of booleans.
    count_PU11 = kept_PUOI.sum((2, 3), keepdim=True)
    total_PU11 = size_PUOI.mul_(kept_PUOI).sum((2, 3), keepdim=True)
    return kept_PUOI, (total_PU11 / (2 * count_PU11.clamp(min=1))).clamp(min=SMALLEST_SCALE)


def _quantised(weight_OI: Tensor, stages: int) -> Tensor:
    left_PUOI = _doubled_parts(weight_OI)
    value_PUOI = None
    for stage in range(stages):
        kept_PUOI, scale_PU11 = _nearest(left_PUOI)
        step_PUOI = kept_PUOI.mul_(scale_PU11).copysign_(left_PUOI)
        if stage < stages - 1:
            left_PUOI.sub_(step_PUOI, alpha=2)
        value_PUOI = step_PUOI if value_PUOI is None else value_PUOI.add_(step_PUOI)
    assert value_PUOI is not None, "there is at least one stage"
    return _real(value_PUOI)


class _PhaseWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, blend_: Tensor, stages: int) -> Tensor:
        latent_OI = exact(weight_OI)
        value_OI = _quantised(latent_OI, stages)
        return torch.lerp(latent_OI, value_OI, blend_.to(latent_OI.dtype), out=value_OI).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def phase_weight(weight_OI: Tensor, blend_: Tensor, stages: int) -> Tensor:
    """The weight a forward pass multiplies by, in the latent weight's dtype; `blend_` is a scalar tensor in [0, 1]."""
    return _PhaseWeight.apply(weight_OI, blend_, stages)


class Fairy2i(Quantiser):
    """A stage costs a bit of a weight."""

    name = "fairy2i"
    # Scaling some rows would change the means, and with them what is left of all others.
    qk_clip = "matrix"
    exports = frozenset({"hf", "dense", "packed"})

    def __init__(self, stages: int = 2) -> None:
        self.stages: int = stages
        self.bits = float(stages)

    def of(self, record: Record) -> Fairy2i:
        return Fairy2i(record.stages or self.stages)

    def stored_bits(self, out_features: int, in_features: int) -> float:
        return self.bits + 32.0 * 4 * self.stages / (out_features * in_features)

    def check(self, linear: nn.Linear) -> str:
        if linear.out_features % 2 == 0 == linear.in_features % 2:
            return ""
        return f"{linear.out_features} x {linear.in_features}, and complex numbers take pairs: both must be even"

    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        return phase_weight(layer.weight, blend_, self.stages)

    def encode(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        return planes(layer.weight, self.stages)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return dense(codes, scales)


FAIRY2I = Fairy2i()
