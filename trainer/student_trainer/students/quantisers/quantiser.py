"""The trainer's interface to a weight quantiser. Each is a file of this package, listed in its `__init__`.

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
    """The tensor in float32, or in its own dtype if that is finer: what quantisers compute in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Quantiser(ABC):
    """Weights that are trained in full precision and multiply in few bits. Stateless: a layer holds its weights.

    `bits`: per weight when packed, not counting scales.
    `grouped`: whether the settings choose its bits, and how many weights share a scale.
    `stages`: how many times it quantises, each time what is left of the weight; None if there is no choice.
    `activations`, `sub_norm`: what goes with it if the settings do not say.
    `qk_clip`: what may be scaled to scale a layer's outputs by the same factor: single "rows" of the latent weight, the
    whole "matrix", or "nothing". `row_scales`: names of learnt parameters that must be scaled with it.
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
        """This quantiser with the settings of a record."""
        return self

    def stored_bits(self, out_features: int, in_features: int) -> float:
        """Bits per weight of a packed layer, counting scales: here one of 32 bits for the whole tensor."""
        return self.bits + 32.0 / (out_features * in_features)

    def check(self, linear: nn.Linear) -> str:
        """Why it can't quantise this layer, such as an odd width; empty if it can."""
        return ""

    def learnt(self, layer: nn.Linear) -> dict[str, Tensor]:
        """Initial values of what a layer learns besides its latent weight, such as scales, by the parameter's name."""
        return {}

    @abstractmethod
    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        """The weight [O, I] that the layer multiplies by, in its own dtype: (1 - blend) * latent + blend * quantised,
        exact at both ends, with a gradient to the latent weight. `blend_`: a scalar in [0, 1].
        """

    def codes(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """What packed formats store of a latent weight: int8 codes [O, I], and the float32 scalar that scales them."""
        raise ValueError(f"quantiser {self.name} has no codes that share one scale: only format 'hf' can hold it")

    def encode(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """What `export.packed` stores of a layer: codes 0 to 3 as uint8, with the input as their last dimension, and
        float32 scales.
        """
        raise ValueError(f"quantiser {self.name} has no two-bit codes")

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight [O, I] from the results of `encode`, bit for bit what the layer multiplies by."""
        raise ValueError(f"quantiser {self.name} has no two-bit codes")

    def foreign_record(self, config: Any, quantisation: dict[str, Any] | None, path: str) -> Record | None:
        """The record of a third-party checkpoint at `path`, if it is quantised in this way; None if it is not.

        `quantisation`: the config's `quantization_config`. ValueError if the checkpoint can't be trained.
        """
        return None
