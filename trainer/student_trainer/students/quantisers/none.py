"""Full precision: a layer multiplies by its weight itself. One of `QUANTISERS`; a student keeps its plain linears."""

from __future__ import annotations

from torch import Tensor, nn

from student_trainer.students.quantisers.quantiser import Quantiser


class NoQuantiser(Quantiser):
    name = "none"
    bits = 16.0  # as served, in bfloat16

    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        return layer.weight

    def stored_bits(self, out_features: int, in_features: int) -> float:
        return self.bits


NONE = NoQuantiser()
