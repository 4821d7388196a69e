"""Bits per weight of a quantised student, including scales and adapters. Called by `folder` and `gguf` for the card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from student_trainer.students.quant_linear import quant_linears, quantiser_of

ADAPTER_BITS = 16  # of an adapter's parameter as it is served


@dataclass(frozen=True)
class BitsAWeight:
    """Means over the weights of all quantised layers: as packed, and including adapters."""

    packed: float
    with_adapter: float


def bits_a_weight(model: Any) -> BitsAWeight | None:
    """The bits per weight of a quantised model; None for one in full precision."""
    weights, packed, added = 0, 0.0, 0
    for _, layer in quant_linears(model):
        count = layer.weight.numel()
        weights += count
        packed += count * quantiser_of(layer).stored_bits(layer.out_features, layer.in_features)
        if layer.correction is not None:
            added += sum(parameter.numel() for parameter in layer.correction.parameters())
    if not weights:
        return None
    return BitsAWeight(packed / weights, (packed + ADAPTER_BITS * added) / weights)
