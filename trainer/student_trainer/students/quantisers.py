"""BitNet b1.58's two quantisers with straight-through gradients. Used by `bitnet`; the exports read `ternary`.

Weights (arXiv 2402.17764): s = mean |W| over the tensor, codes = clip(round(W / s), -1, 1), value codes * s.
Activations: a = 127 / max |x| over a token's features, value clip(round(x a), -128, 127) / a.
Both are computed in float32 and cast back, in the order of operations of transformers' BitNet integration (a product
with the inverse scale, then a quotient), so that an exported checkpoint gives the same bits there. No torch.compile.

`blend_` scalars mix the operand with its quantised value: 0 is full precision and 1 is quantised, exactly so at both
ends. The gradient is the identity throughout: d loss / d latent = d loss / d operand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# transformers and the released BitDistill code clamp both scales here: an all-zero tensor must not divide by zero.
SMALLEST_SCALE = 1e-5


def inverse_scale(weight_OI: Tensor) -> Tensor:
    """1 / mean |W|, a float32 scalar."""
    return 1.0 / weight_OI.detach().float().abs().mean().clamp_(min=SMALLEST_SCALE)


def ternary(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in {-1, 0, 1} as int8 [O, I], and the float32 scalar that each is worth."""
    inverse = inverse_scale(weight_OI)
    codes_OI = (weight_OI.detach().float() * inverse).round_().clamp_(-1, 1)
    return codes_OI.to(torch.int8), 1.0 / inverse


class _TernaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, blend_: Tensor) -> Tensor:
        latent_OI = weight_OI.float()
        inverse = inverse_scale(latent_OI)
        value_OI = (latent_OI * inverse).round_().clamp_(-1, 1).div_(inverse)
        return torch.lerp(latent_OI, value_OI, blend_.float(), out=value_OI).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Int8Activations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ND: Tensor, blend_: Tensor) -> Tensor:
        exact_ND = input_ND.float()
        inverse_N1 = 127.0 / exact_ND.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_SCALE)
        value_ND = (exact_ND * inverse_N1).round_().clamp_(-128, 127).div_(inverse_N1)
        return torch.lerp(exact_ND, value_ND, blend_.float(), out=value_ND).to(input_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def ternary_weight(weight_OI: Tensor, blend_: Tensor) -> Tensor:
    """The weight a forward pass multiplies by, in the latent weight's dtype; `blend_` is a scalar tensor in [0, 1]."""
    return _TernaryWeight.apply(weight_OI, blend_)


def int8_activations(input_ND: Tensor, blend_: Tensor) -> Tensor:
    """Activations [..., D] on a token's grid of 256 steps, in their own dtype; `blend_` as in `ternary_weight`."""
    return _Int8Activations.apply(input_ND, blend_)
