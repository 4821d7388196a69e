"""The head's matrix products: hidden states to logits, and the gradient by logits back to hidden states and weights.

Called by `chunks`. Logits are never rounded to bf16. On a GPU bf16 inputs are multiplied as bf16 and the sums kept in
float32. A CPU has no such product, so there logits of bf16 inputs are made in float32, at twice the time of bf16, and
only the two products of the backward pass run in bf16: a chunk's share of the weight's gradient is rounded to bf16, the
sum over chunks is float32. All else runs in float32; float64 stays float64.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

# Ids whose share of the weight's gradient exists in bf16 at a time on a CPU.
SLICE = 2**14


class HeadProjection:
    """A head with its weights in the dtype that the products run in; the weight is converted once a call, not a chunk.

    logits = cap(scale * (hidden @ weight.T + bias)) with cap(z) = softcap * tanh(z / softcap).
    """

    def __init__(
        self, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, scale: float, hidden: torch.dtype
    ) -> None:
        wide = torch.promote_types(torch.promote_types(hidden, weight_VD.dtype), torch.float32)
        low = hidden == torch.bfloat16 and weight_VD.dtype != torch.float64
        self.fused = low and weight_VD.is_cuda
        self.dtype = torch.bfloat16 if self.fused else wide
        self.back_dtype = torch.bfloat16 if low else wide
        self.accumulator = wide
        self._given_VD = weight_VD.detach()
        self.weight_VD = self._given_VD.to(self.dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(self.accumulator)
        self.softcap = softcap
        self.scale = scale

    @cached_property
    def back_weight_VD(self) -> Tensor:
        """The weight as the backward pass multiplies by it."""
        return self._given_VD.to(self.back_dtype)

    def project(self, hidden_ND: Tensor, out_NV: Tensor) -> None:
        """hidden @ weight.T into `out_NV`; `cap_` finishes the logits."""
        if self.fused:
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
        """gradient @ weight, the gradient in `back_dtype`."""
        if self.fused:
            return torch.mm(gradient_NV, self.back_weight_VD, out_dtype=torch.float32)
        return gradient_NV @ self.back_weight_VD

    def back_to_weight_(self, total_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor, begin: bool) -> None:
        """total += gradient.T @ hidden, both in `back_dtype`; with `begin` the product alone, whatever `total` holds.

        So the first chunk spares an array as large as the head two passes: clearing it, and reading the zeros.
        """
        if self.back_dtype == total_VD.dtype:
            if begin:
                torch.mm(gradient_NV.t(), hidden_ND, out=total_VD)
            else:
                total_VD.addmm_(gradient_NV.t(), hidden_ND)
        elif self.fused:
            if begin:
                torch.mm(gradient_NV.t(), hidden_ND, out_dtype=torch.float32, out=total_VD)
            else:
                torch.addmm(total_VD, gradient_NV.t(), hidden_ND, out_dtype=torch.float32, out=total_VD)
        else:
            for total_vD, gradient_Nv in zip(total_VD.split(SLICE), gradient_NV.split(SLICE, 1), strict=True):
                product_vD = gradient_Nv.t() @ hidden_ND
                total_vD.copy_(product_vD) if begin else total_vD.add_(product_vD)
