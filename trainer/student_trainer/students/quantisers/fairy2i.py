"""Fairy2i (arXiv 2512.02901): a real weight as two complex ones, of 1, i, -1 and -i times scales. One of `QUANTISERS`;
`export` packs the output of `planes`, and `dense` reads it.

A real matrix with even sides and blocks A11, A12, A21, A22 is the map y = U x + W conj(x) of half as many complex
numbers, with U = (A11 + A22)/2 + i (A21 - A12)/2 and W = (A11 - A22)/2 + i (A12 + A21)/2. Every entry of U and of W is
replaced by its nearest direction, times a scale: the mean |Re| of the entries with a real direction, or the mean |Im|
of those with an imaginary one. A second stage does the same to what is left. Computed in float32; activations are not
rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.students.quantisers.quantiser import Quantiser, exact
from student_trainer.students.quantisers.record import Record

# The scale of an axis that no entry points along, as in the released code.
SMALLEST_SCALE = 1e-6


def complex_form(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """U and W [O/2, I/2] in complex128, where sums and differences of float32 numbers are exact, or nearly."""
    u_OI, w_OI = (torch.complex(re_OI / 2, im_OI / 2) for re_OI, im_OI in _doubled_parts(weight_OI.double()))
    return u_OI, w_OI


def real_form(u_OI: Tensor, w_OI: Tensor) -> Tensor:
    """The real weight [O, I] from U and W [O/2, I/2]."""
    return _real(u_OI.real, u_OI.imag, w_OI.real, w_OI.imag)


def planes(weight_OI: Tensor, stages: int) -> tuple[Tensor, Tensor]:
    """Codes k of the directions i^k, uint8 [stages, 2, O/2, I/2], and the scales of real and of imaginary directions,
    [stages, 2, 2]; the second dimension is U, W.
    """
    codes, scales = [], []
    for re_OI, im_OI in _doubled_parts(exact(weight_OI.detach())):
        for _ in range(stages):
            real_OI, imaginary_OI, worth = _nearest(re_OI, im_OI)
            # 1, i, -1, -i are k = 0..3: 0 or 2 by the sign of the real part, 1 or 3 by that of the imaginary.
            codes.append(torch.where(real_OI > 0, 2 * torch.signbit(re_OI), 1 + 2 * torch.signbit(im_OI)))
            scales.append(torch.stack(worth))
            _step(re_OI, im_OI, real_OI, imaginary_OI, worth)
    shape = (2, stages)
    return (
        torch.stack(codes).to(torch.uint8).unflatten(0, shape).transpose(0, 1).contiguous(),
        torch.stack(scales).unflatten(0, shape).transpose(0, 1).contiguous(),
    )


def dense(codes_SUOI: Tensor, scales_SUP: Tensor) -> Tensor:
    """The real weight [O, I] from the output of `planes`, bit for bit what a layer multiplies by."""
    part_PUOI = scales_SUP.new_zeros(2, *codes_SUOI.shape[1:])
    for codes_UOI, scales_UP in zip(codes_SUOI, scales_SUP, strict=True):
        # k = 2 and 3 are the negative directions, odd k the imaginary ones: value = sign x scale on one axis.
        sign_UOI = torch.where(codes_UOI >= 2, -1.0, 1.0).to(scales_UP.dtype)
        imaginary_UOI = codes_UOI % 2 == 1
        for axis, chosen in enumerate((~imaginary_UOI, imaginary_UOI)):
            part_PUOI[axis] += chosen * sign_UOI * scales_UP[:, axis, None, None]
    (u_re, w_re), (u_im, w_im) = part_PUOI
    return _real(u_re, u_im, w_re, w_im)


def _blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A11, A12, A21 and A22, as views."""
    rows, columns = weight_OI.shape
    # [2, O/2, 2, I/2] to [2, 2, O/2, I/2]: the block row and the block column first.
    block_RCOI = weight_OI.view(2, rows // 2, 2, columns // 2).transpose(1, 2)
    return block_RCOI[0, 0], block_RCOI[0, 1], block_RCOI[1, 0], block_RCOI[1, 1]


def _doubled_parts(weight_OI: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Twice the real and the imaginary part of U, then of W: new tensors [O/2, I/2]."""
    a11, a12, a21, a22 = _blocks(weight_OI)
    yield a11 + a22, a21 - a12
    yield a11 - a22, a21 + a12


def _real(u_re: Tensor, u_im: Tensor, w_re: Tensor, w_im: Tensor) -> Tensor:
    """The real weight [O, I] from the parts of U and W, that is, from half of what `_doubled_parts` gives."""
    weight_OI = u_re.new_empty(2 * u_re.shape[0], 2 * u_re.shape[1])
    a11, a12, a21, a22 = _blocks(weight_OI)
    # A11 = Re U + Re W, A12 = Im W - Im U, A21 = Im U + Im W, A22 = Re U - Re W.
    torch.add(u_re, w_re, out=a11)
    torch.sub(w_im, u_im, out=a12)
    torch.add(u_im, w_im, out=a21)
    torch.sub(u_re, w_re, out=a22)
    return weight_OI


def _nearest(re_OI: Tensor, im_OI: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """1 where an entry's nearest direction is real and 0 elsewhere, the same for imaginary, and the scale of each.

    The sector of +1 is [-pi/4, pi/4): on the edges, where both parts have the same size, unlike signs count as real.
    Numbers instead of booleans, in place: a comparison, or a selection by one, takes as long as ten such operations.
    """
    size_re_OI, size_im_OI = re_OI.abs(), im_OI.abs()
    # +1 where the real part has the larger size, -1 where the imaginary one has, 0 on the diagonals.
    real_OI = (size_re_OI - size_im_OI).sign_()
    apart_OI = (re_OI + im_OI).abs_().sign_()  # 0 where the parts are each other's negative
    # 1 stays 1 and -1 becomes 0; on a diagonal 1 where the parts are each other's negative, else 0.
    real_OI.sub_(apart_OI).add_(1).clamp_(0, 1)
    imaginary_OI = torch.sub(1, real_OI, out=apart_OI)
    worth = []
    for size_OI, kept_OI in ((size_re_OI, real_OI), (size_im_OI, imaginary_OI)):
        count = kept_OI.sum().clamp_(min=1)
        # The mean size of the entries that point along the axis; halved, since the parts here are doubled.
        worth.append((size_OI.mul_(kept_OI).sum() / (2 * count)).clamp_(min=SMALLEST_SCALE))
    return real_OI, imaginary_OI, (worth[0], worth[1])


def _step(
    re_OI: Tensor, im_OI: Tensor, real_OI: Tensor, imaginary_OI: Tensor, worth: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The parts of the nearest directions times their scales; subtracts them from the doubled parts, in place."""
    step_re_OI, step_im_OI = real_OI.mul_(worth[0]).copysign_(re_OI), imaginary_OI.mul_(worth[1]).copysign_(im_OI)
    # Twice, since the parts are doubled: the next stage quantises what is left.
    re_OI.sub_(step_re_OI, alpha=2)
    im_OI.sub_(step_im_OI, alpha=2)
    return step_re_OI, step_im_OI


def _quantised(weight_OI: Tensor, stages: int) -> Tensor:
    parts = []
    for re_OI, im_OI in _doubled_parts(weight_OI):
        value_re_OI, value_im_OI = _step(re_OI, im_OI, *_nearest(re_OI, im_OI))
        for _ in range(1, stages):
            step_re_OI, step_im_OI = _step(re_OI, im_OI, *_nearest(re_OI, im_OI))
            value_re_OI.add_(step_re_OI)
            value_im_OI.add_(step_im_OI)
        parts += [value_re_OI, value_im_OI]
    return _real(*parts)


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
    """Each stage takes one bit per weight."""

    name = "fairy2i"
    # Scaling some rows would change the means, and with them the quantised values of all others.
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
        return f"{linear.out_features} x {linear.in_features}, but a complex number takes a pair: both must be even"

    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        return phase_weight(layer.weight, blend_, self.stages)

    def encode(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        return planes(layer.weight, self.stages)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return dense(codes, scales)


FAIRY2I = Fairy2i()
