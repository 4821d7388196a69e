"""The head's matrix products: hidden states to logits, and the logits' gradient back to hidden states and weights.

Called by `chunks`. Logits are never rounded to bf16, whatever their factors. If the student computes in bf16, or the
hidden states are bf16 and the device computes in it:

    on a GPU    all three products take bf16 factors and accumulate in float32. So hidden states and weights are rounded
                to bf16 beforehand, and the logits' gradient once.
    on a CPU    no product of bf16 factors has a float32 result. Logits are computed in float32, from factors that are
                not rounded; the two products of the backward pass run in bf16: the logits' gradient and both other
                factors are rounded, and so are the gradient of the hidden states and each chunk's part of the weight's.
                The sum over chunks is float32.

Everything else runs in float32; float64 stays float64.
"""

from __future__ import annotations

from functools import cache, cached_property

import torch
from torch import Tensor

from teacher_proto.hardware import computes_bfloat16

# Ids per slice of the weight's gradient, where it can't be accumulated in place.
SLICE = 2**14


def multiplies_into_float32(device: torch.device) -> bool:
    """Whether a product of bf16 factors can have a float32 result. Tests force both answers on a CPU."""
    return device.type == "cuda"


@cache
def adds_into_float32(device: torch.device) -> bool:
    """Whether a product of bf16 factors can be added to a float32 sum, found out by trying; torch 2.9 takes only a bf16
    sum.
    """
    factor = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


class HeadProjection:
    """A head with its weight in the dtype of the products; it is converted once per call, not per chunk.

    logits = cap(scale * (hidden @ weight.T + bias)) with cap(z) = softcap * tanh(z / softcap).
    `hidden`: the dtype of the hidden states; `compute`: the dtype that the student computes in.
    """

    def __init__(
        self, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, scale: float, hidden: torch.dtype,
        compute: torch.dtype = torch.float32,
    ):  # fmt: skip
        wide = torch.promote_types(torch.promote_types(hidden, weight_VD.dtype), torch.float32)
        # Whether products may take bf16 factors at all; float64 inputs are computed in float64. `compute` holds on any
        # hardware, so that a run that is resumed elsewhere computes as it began.
        low = compute == torch.bfloat16 or (hidden == torch.bfloat16 and computes_bfloat16(weight_VD.device))
        low = low and wide == torch.float32
        self.fused = low and multiplies_into_float32(weight_VD.device)
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
        """The weight in the dtype of the backward products."""
        return self._given_VD.to(self.back_dtype)

    def project(self, hidden_ND: Tensor, out_NV: Tensor) -> None:
        """hidden @ weight.T into `out_NV`; `cap_` then makes logits of it."""
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
            # C tanh(z / C), in place: [chunk, V] is the largest array of all, and is not copied.
            z_NV.div_(self.softcap).tanh_().mul_(self.softcap)

    def uncap_(self, gradient_NV: Tensor, z_NV: Tensor) -> None:
        """The gradient with respect to logits `z_NV` to that with respect to hidden @ weight.T + bias, in place."""
        if self.softcap is not None:
            # z = C tanh(y / C), so dz / dy = 1 - tanh^2 = 1 - (z / C)^2.
            gradient_NV.mul_(1.0 - (z_NV / self.softcap).square_())
        if self.scale != 1.0:
            gradient_NV.mul_(self.scale)

    def back_to_hidden(self, gradient_NV: Tensor) -> Tensor:
        """gradient @ weight, the gradient in `back_dtype`."""
        if self.fused:
            return torch.mm(gradient_NV, self.back_weight_VD, out_dtype=torch.float32)
        return gradient_NV @ self.back_weight_VD

    def back_to_weight_(self, total_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor, begin: bool) -> None:
        """total += gradient.T @ hidden, both in `back_dtype`; with `begin`, total = the product, whatever it holds.

        So the first chunk saves two passes over an array as large as the head: clearing it, and reading the zeros.
        """
        if self.back_dtype == total_VD.dtype:
            if begin:
                torch.mm(gradient_NV.t(), hidden_ND, out=total_VD)
            else:
                total_VD.addmm_(gradient_NV.t(), hidden_ND)
        elif self.fused and begin:
            torch.mm(gradient_NV.t(), hidden_ND, out_dtype=torch.float32, out=total_VD)
        elif self.fused and adds_into_float32(total_VD.device):
            torch.addmm(total_VD, gradient_NV.t(), hidden_ND, out_dtype=torch.float32, out=total_VD)
        else:
            # No product accumulates in float32 here: for one slice of the head at a time, it is then added in float32.
            wide = {"out_dtype": torch.float32} if self.fused else {}
            for total_vD, gradient_Nv in zip(total_VD.split(SLICE), gradient_NV.split(SLICE, 1), strict=True):
                product_vD = torch.mm(gradient_Nv.t(), hidden_ND, **wide)
                total_vD.copy_(product_vD) if begin else total_vD.add_(product_vD)
