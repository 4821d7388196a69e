"""ParetoQ's two bits (stretched elastic quantisation, arXiv 2502.02631): four levels per weight, and a learnt scale per
row. One of `QUANTISERS`; `export` packs the output of `levels`.

q = alpha * (round(2 clip(w / alpha, +-.99) - .5) + .5) / 2: a quarter or three quarters of the row's alpha, of either
sign. alpha starts as the row's largest |w|. With g the gradient with respect to q, a weight gets g where |w / alpha| <=
.99 and 0 elsewhere; alpha gets g (q - w) / alpha there and +-.75 g elsewhere, summed over the row and divided by the
square root of the matrix's size. Computed in float32; activations are not rounded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.students.quantisers.quantiser import Quantiser, exact

EDGE = 0.99
# For a row of zeros, too.
SMALLEST_ALPHA = 1e-5
ALPHA = "alpha"


def levels(weight_OI: Tensor, alpha_O: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 to 3 as uint8 [O, I], and the step between their values in each row [O]: value (code - 1.5) step."""
    weight_OI, half_O1 = exact(weight_OI.detach()), _half(alpha_O.detach())
    return (_whole(weight_OI / half_O1) + 2).to(torch.uint8), half_O1[:, 0]


def dense(codes_OI: Tensor, step_O: Tensor) -> Tensor:
    """The weight [O, I] from the output of `levels`, bit for bit what a layer multiplies by."""
    return (codes_OI.to(step_O.dtype) - 1.5) * step_O[:, None]


def _half(alpha_O: Tensor) -> Tensor:
    """Half of alpha [O, 1], the distance between two levels."""
    return exact(alpha_O).clamp(min=SMALLEST_ALPHA)[:, None] / 2


def _whole(ratio_OI: Tensor) -> Tensor:
    """The level minus a half, for a ratio of weight to half its alpha: -2, -1, 0 or 1. In place."""
    return ratio_OI.clamp_(-2 * EDGE, 2 * EDGE).sub_(0.5).round_()


class _SteppedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, alpha_O: Tensor, blend_: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI, alpha_O, blend_)
        latent_OI, half_O1 = exact(weight_OI), _half(alpha_O)
        # (round(clip(2 w / alpha) - .5) + .5) alpha / 2: levels -1.5, -.5, .5 and 1.5 of half an alpha.
        value_OI = _whole(latent_OI / half_O1).add_(0.5).mul_(half_O1)
        return torch.lerp(latent_OI, value_OI, blend_.to(latent_OI.dtype), out=value_OI).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        weight_OI, alpha_O, blend_ = ctx.saved_tensors
        ratio_OI = exact(weight_OI) / _half(alpha_O)
        gradient_OI, blend_ = exact(gradients[0]), blend_.to(ratio_OI.dtype)
        # 1 where the ratio is clipped and 0 elsewhere: on a CPU a selection by booleans takes as long as ten products.
        outside_OI = (ratio_OI - ratio_OI.clamp(-2 * EDGE, 2 * EDGE)).abs_().sign_()
        # Twice d q / d alpha: level - ratio inside, the level outside.
        slope_OI = (ratio_OI * outside_OI).sub_(ratio_OI).add_(_whole(ratio_OI)).add_(0.5)
        # As for learnt step sizes, 1 / sqrt(number of weights), or alpha would move faster than its weights.
        of_alpha_O = slope_OI.mul_(gradient_OI).sum(1).mul_(blend_ / (2 * math.sqrt(weight_OI.numel())))
        # (1 - blend x clipped) g: all of the exact share, and of the quantised share what is not clipped.
        of_weight_OI = outside_OI.mul_(-blend_).add_(1).mul_(gradient_OI)
        return of_weight_OI.to(weight_OI.dtype), of_alpha_O.to(alpha_O.dtype), None


def stepped_weight(weight_OI: Tensor, alpha_O: Tensor, blend_: Tensor) -> Tensor:
    """The weight a forward pass multiplies by, in the latent weight's dtype; `blend_` is a scalar tensor in [0, 1]."""
    return _SteppedWeight.apply(weight_OI, alpha_O, blend_)


class Seq2(Quantiser):
    name = "seq2"
    bits = 2.0
    exports = frozenset({"hf", "dense", "packed"})
    row_scales = (ALPHA,)

    def learnt(self, layer: nn.Linear) -> dict[str, Tensor]:
        return {ALPHA: layer.weight.detach().abs().amax(1)}

    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        return stepped_weight(layer.weight, layer.get_parameter(ALPHA), blend_)

    def encode(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        return levels(layer.weight, layer.get_parameter(ALPHA))

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return dense(codes, scales)

    def stored_bits(self, out_features: int, in_features: int) -> float:
        return self.bits + 32.0 / in_features


SEQ2 = Seq2()
