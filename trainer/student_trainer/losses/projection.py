"""The head's matrix products: hidden states to logits, and the gradient by logits back to hidden states and weights.

Called by `chunks`. Logits are never rounded to bf16, whatever they are made of. Where the student computes in bf16, or
hidden states are bf16 and the device computes in it:

    on a GPU    all three products take bf16 factors and add up in float32. So hidden states and weights are rounded to
                bf16 on their way in, and the gradient by the logits once.
    on a CPU    no product of bf16 factors has a float32 result. Logits are made in float32, from factors that are not
                rounded; the two products of the backward pass run in bf16: the gradient by the logits and both factors
                are rounded, and so is the gradient of the hidden states and a chunk's share of the weight's. The sum
                over chunks is float32.

All else runs in float32; float64 stays float64.
"""

from __future__ import annotations

from functools import cache, cached_property

import torch
from torch import Tensor

from teacher_proto.hardware import computes_bfloat16

# Ids whose share of the weight's gradient exists at a time, where it can't be added up in place.
SLICE = 2**14


def multiplies_into_float32(device: torch.device) -> bool:
    """Whether bf16 factors have a product in float32. Tests force both sides on a CPU."""
    return device.type == "cuda"


@cache
def adds_into_float32(device: torch.device) -> bool:
    """Whether a product of bf16 factors can be added to a float32 sum; torch 2.9 wants the sum in bf16. It is tried."""
    factor = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


class HeadProjection:
    """A head with its weights in the dtype that the products run in; the weight is converted once a call, not a chunk.

    logits = cap(scale * (hidden @ weight.T + bias)) with cap(z) = softcap * tanh(z / softcap).
    `hidden`: the dtype of the hidden states; `compute`: that in which the student computes.
    """

    def __init__(
        self, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, scale: float, hidden: torch.dtype,
        compute: torch.dtype = torch.float32,
    ):  # fmt: skip
        wide = torch.promote_types(torch.promote_types(hidden, weight_VD.dtype), torch.float32)
        # What the student computes in is not asked of the hardware again: a run goes on elsewhere as it began.
        # Whether products may take bf16 factors at all; float64 inputs ask for float64.
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
            # C tanh(z / C), in place: [chunk, V] is the largest array there is, and is not copied.
            z_NV.div_(self.softcap).tanh_().mul_(self.softcap)

    def uncap_(self, gradient_NV: Tensor, z_NV: Tensor) -> None:
        """The gradient by logits `z_NV` to the gradient by (hidden @ weight.T + bias), in place."""
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
        """total += gradient.T @ hidden, both in `back_dtype`; with `begin` the product alone, whatever `total` holds.

        So the first chunk spares an array as large as the head two passes: clearing it, and reading the zeros.
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
            # No product adds to float32 here: a slice of the head at a time, whose product is added up in float32.
            wide = {"out_dtype": torch.float32} if self.fused else {}
            for total_vD, gradient_Nv in zip(total_VD.split(SLICE), gradient_NV.split(SLICE, 1), strict=True):
                product_vD = torch.mm(gradient_Nv.t(), hidden_ND, **wide)
                total_vD.copy_(product_vD) if begin else total_vD.add_(product_vD)
