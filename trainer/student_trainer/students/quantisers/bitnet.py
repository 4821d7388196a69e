"""BitNet b1.58's ternary weights (arXiv 2402.17764), by default with int8 activations and SubLN, see `quant_linear`.
One of `QUANTISERS`; the packed exports call `ternary`.

s = mean |W| over the tensor, codes = clip(round(W / s), -1, 1), value codes * s. Computed in float32 and cast back, in
the order of operations of transformers' BitNet integration (a product with the inverse scale, then a quotient), so that
an exported checkpoint gives the same bits there. No torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.students.quantisers.activations import SMALLEST_SCALE
from student_trainer.students.quantisers.quantiser import Quantiser
from student_trainer.students.quantisers.record import Record, SubNorm


def inverse_scale(weight_OI: Tensor) -> Tensor:
    """1 / mean |W|, a float32 scalar."""
    return 1.0 / weight_OI.detach().float().abs().mean().clamp_(min=SMALLEST_SCALE)


def ternary(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in {-1, 0, 1} as int8 [O, I], and the float32 scalar that a code is multiplied by."""
    inverse = inverse_scale(weight_OI)
    codes_OI = (weight_OI.detach().float() * inverse).round_().clamp_(-1, 1)
    return codes_OI.to(torch.int8), 1.0 / inverse


class _TernaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, blend_: Tensor) -> Tensor:
        latent_OI = weight_OI.float()
        inverse = inverse_scale(latent_OI)
        # codes / (1 / s): the quotient that transformers takes, not a product with s, which rounds differently.
        value_OI = (latent_OI * inverse).round_().clamp_(-1, 1).div_(inverse)
        return torch.lerp(latent_OI, value_OI, blend_.float(), out=value_OI).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Straight through: round and clip have derivative 0 or none, and are treated as the identity.
        return gradients[0], None


def ternary_weight(weight_OI: Tensor, blend_: Tensor) -> Tensor:
    """The weight a forward pass multiplies by, in the latent weight's dtype; `blend_` is a scalar tensor in [0, 1]."""
    return _TernaryWeight.apply(weight_OI, blend_)


class BitNet(Quantiser):
    name = "bitnet"
    bits = 1.58  # log2(3)
    activations = "int8"
    sub_norm = "output"
    # Scaling some rows would change mean |W|, and with it the codes of all others.
    qk_clip = "matrix"
    exports = frozenset({"hf", "bitnet", "gguf", "dense"})

    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        return ternary_weight(layer.weight, blend_)

    def codes(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        return ternary(weight_OI)

    def foreign_record(self, config: Any, quantisation: dict[str, Any] | None, path: str) -> Record | None:
        """The record of transformers' own BitNet: its architecture, or its `quantization_config` on another one."""
        if quantisation is not None and quantisation.get("quant_method") != self.name:
            return None
        mode = (quantisation or {}).get("quantization_mode", "offline")
        if quantisation is not None and mode != "online":
            raise ValueError(
                f"{path} holds packed ternary weights (quantization_mode '{mode}'): their latent weights are gone, so "
                "they cannot be trained; use the bf16 checkpoint, or the export of format 'hf'"
            )
        own_norms = config.model_type == "bitnet"
        if quantisation is None and not own_norms:
            return None
        normed: SubNorm = "all" if (quantisation or {}).get("use_rms_norm") else "none"
        eps = config.rms_norm_eps if own_norms else (quantisation or {}).get("rms_norm_eps", 1e-6)
        return Record(self.name, "output" if own_norms else normed, eps, self.activations)


BITNET = BitNet()
