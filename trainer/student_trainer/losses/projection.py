"""The head's matrix products: hidden states to logits, and the gradient by logits back to hidden states and weights.

Called by `head`. Products run in float32 (float64 stays float64) on a CPU; on a GPU bf16 inputs are multiplied as bf16
and summed into float32, so neither logits nor the weight's gradient are ever rounded to bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HeadProjection:
    """A head with its weights in the dtype that the products run in; the weight is converted once a call, not a chunk.

    logits = cap(scale * (hidden @ weight.T + bias)) with cap(z) = softcap * tanh(z / softcap).
    """

    def __init__(
        self, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, scale: float, hidden: torch.dtype
    ) -> None:
        wide = torch.promote_types(torch.promote_types(hidden, weight_VD.dtype), torch.float32)
        self.mixed = weight_VD.is_cuda and hidden == torch.bfloat16 and weight_VD.dtype != torch.float64
        self.dtype = torch.bfloat16 if self.mixed else wide
        self.accumulator = torch.float32 if self.mixed else wide
        self.weight_VD = weight_VD.detach().to(self.dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(self.accumulator)
        self.softcap = softcap
        self.scale = scale

    def project(self, hidden_ND: Tensor, out_NV: Tensor) -> None:
        """hidden @ weight.T into `out_NV`; `cap_` finishes the logits."""
        if self.mixed:
            torch.mm(hidden_ND, self.weight_VD.t(), out_dtype=torch.float32, out=out_NV)
        else:
            torch.mm(hidden_ND, self.weight_VD.t(), out=out_NV)

    def cap_(self, z_NV: Tensor) -> None:
        """Products to logits, in place: bias, scale and soft cap."""
        if self.bias_V is not None:
            z_NV.add_(self.bias_V)
        if self.scale != 1.0:
            z_NV.mul_(self.scale)
        if self.softcap is not None:
            z_NV.div_(self.softcap).tanh_().mul_(self.softcap)

    def uncap_(self, gradient_NV: Tensor, z_NV: Tensor) -> None:
        """The gradient by logits `z_NV` to the gradient by (hidden @ weight.T + bias), in place."""
        if self.softcap is not None:
            gradient_NV.mul_(1.0 - (z_NV / self.softcap).square_())
        if self.scale != 1.0:
            gradient_NV.mul_(self.scale)

    def back_to_hidden(self, gradient_NV: Tensor) -> Tensor:
        """gradient @ weight, the gradient in `dtype`."""
        if self.mixed:
            return torch.mm(gradient_NV, self.weight_VD, out_dtype=torch.float32)
        return gradient_NV @ self.weight_VD

    def back_to_weight_(self, total_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
        """total += gradient.T @ hidden, both in `dtype`."""
        if self.mixed:
            torch.addmm(total_VD, gradient_NV.t(), hidden_ND, out_dtype=torch.float32, out=total_VD)
        else:
            total_VD.addmm_(gradient_NV.t(), hidden_ND)
