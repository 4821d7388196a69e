"""Activation quantisers by name: what a layer's input is rounded to before the weight multiplies it. Used by
`quant_linear`.

int8: a = 127 / max |x| over a token's features, value clip(round(x a), -128, 127) / a, as in BitNet b1.58 (arXiv
2402.17764); int4: the same with 7 and -8. Computed in float32 and cast back, in the order of operations of
transformers' BitNet integration, so that an exported checkpoint gives the same bits there. No torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# transformers and the released BitDistill code clamp here: an all-zero token must not divide by zero.
SMALLEST_SCALE = 1e-5

# (input [..., D], blend scalar in [0, 1]: 0 exact, 1 quantised) -> the input in its own dtype, straight-through.
ActivationQuantiser = Callable[[Tensor, Tensor], Tensor]


class _RoundedActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ND: Tensor, blend_: Tensor, top: int) -> Tensor:
        exact_ND = input_ND.float()
        # Each token has its own grid: its largest |x| is `top` steps.
        inverse_N1 = float(top) / exact_ND.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_SCALE)
        # As transformers computes it, bit for bit: a product with the inverse, then a quotient by it.
        value_ND = (exact_ND * inverse_N1).round_().clamp_(-top - 1, top).div_(inverse_N1)
        return torch.lerp(exact_ND, value_ND, blend_.float(), out=value_ND).to(input_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def int8_activations(input_ND: Tensor, blend_: Tensor) -> Tensor:
    """Activations [..., D] on a grid of 256 steps per token, in their own dtype; `blend_` is a scalar in [0, 1]."""
    return _RoundedActivations.apply(input_ND, blend_, 127)


def int4_activations(input_ND: Tensor, blend_: Tensor) -> Tensor:
    """The same on a grid of 16 steps."""
    return _RoundedActivations.apply(input_ND, blend_, 7)


ACTIVATIONS: Mapping[str, ActivationQuantiser | None] = {
    "none": None,
    "int8": int8_activations,
    "int4": int4_activations,
}
