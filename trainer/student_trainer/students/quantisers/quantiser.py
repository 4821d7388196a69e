"""What the trainer knows of a quantiser of weights. A file of this package each, listed in its `__init__`.

Read by `quant_linear` (the forward pass), `pretrained` (which checkpoints are its own), `optim.qk_layers` (what may be
scaled) and `export` (what may be packed, and how).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from student_trainer.students.quantisers.record import Record, SubNorm


def exact(tensor: Tensor) -> Tensor:
    """float32, or what is finer: what quantisers compute in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Quantiser(ABC):
    """Weights that are trained in full precision and multiply in few bits. Without state: a layer holds its weights.

    `bits`: of a weight where it is packed, scales not counted.
    `grouped`: whether the settings choose its bits, and how many weights share a scale.
    `stages`: how many times what is left is quantised again, None where that is no choice.
    `activations`, `sub_norm`: what goes with it where the settings do not say.
    `qk_clip`: what may be scaled to make a layer's outputs smaller by as much: single "rows" of the latent weight, the
    whole "matrix", or "nothing". `row_scales`: what is learnt beside it that must be scaled with it.
    `exports`: the formats of `export.EXPORTS` that can hold it; "hf", the latent weights, always can.
    """

    name: ClassVar[str]
    bits: float
    stages: int | None = None
    grouped: ClassVar[bool] = False
    activations: ClassVar[str] = "none"
    sub_norm: ClassVar[SubNorm] = "none"
    qk_clip: ClassVar[Literal["rows", "matrix", "nothing"]] = "rows"
    row_scales: ClassVar[tuple[str, ...]] = ()
    exports: ClassVar[frozenset[str]] = frozenset({"hf"})

    def of(self, record: Record) -> Quantiser:
        """This quantiser as a record sets it."""
        return self

    def stored_bits(self, out_features: int, in_features: int) -> float:
        """Of a weight of a layer where it is packed, its scales counted: here one of 32 bits for the whole tensor."""
        return self.bits + 32.0 / (out_features * in_features)

    def check(self, linear: nn.Linear) -> str:
        """Why it can't quantise this layer, such as one of an odd width; empty where it can."""
        return ""

    def learnt(self, layer: nn.Linear) -> dict[str, Tensor]:
        """First values of what a layer learns beside its latent weight, such as scales, by the parameter's name."""
        return {}

    @abstractmethod
    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        """The weight [O, I] that the layer multiplies by, in its own dtype: (1 - blend) * latent + blend * quantised,
        exactly so at both ends, with a gradient to the latent one. `blend_`: a scalar in [0, 1].
        """

    def codes(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """What packed formats store of a latent weight: int8 codes [O, I], and the float32 scalar each is worth."""
        raise ValueError(f"quantiser {self.name} has no codes that share one scale: only 'hf' can hold it")

    def encode(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """What `export.packed` stores of a layer: codes 0 to 3 as uint8, along the input in the last dimension, and
        float32 scales.
        """
        raise ValueError(f"quantiser {self.name} has no codes of two bits")

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight [O, I] of what `encode` gave, to the bit what the layer multiplies by."""
        raise ValueError(f"quantiser {self.name} has no codes of two bits")

    def foreign_record(self, config: Any, quantisation: dict[str, Any] | None, path: str) -> Record | None:
        """What somebody else's checkpoint at `path` says, where it is quantised in this way; None where it is not.

        `quantisation`: the config's `quantization_config`. ValueError where it can't be trained.
        """
        return None
