"""An output head, the student's or the teacher's, which makes logits from final hidden states. Used by students and
losses; `losses.projection` computes it chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """logits = cap(scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap) where there is one."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [..., V] float32 of hidden rows [..., D], with the product in the weight's dtype."""
        z_NV = torch.nn.functional.linear(hidden_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)
        z_NV = z_NV.float() * self.scale
        return z_NV if self.softcap is None else self.softcap * torch.tanh(z_NV / self.softcap)
