"""A teacher's output head: how logits follow from final hidden states, and the file that `GET /v1/head` returns.

logits = scale * soft_cap(hidden @ weight.T + bias), with soft_cap(z) = cap * tanh(z / cap) if the model has one.
The file is safetensors: `weight` [V, D], `bias` [V] if there is one, `soft_cap` and `scale` as float32 scalars.
Used by the engines and by the trainer's local teacher. torch is imported on demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeadScaling:
    """What a model applies to the product of its head. A `soft_cap` of None caps nothing."""

    soft_cap: float | None = None
    scale: float = 1.0

    def __call__(self, product_NV: torch.Tensor) -> torch.Tensor:
        logits_NV = product_NV
        if self.soft_cap is not None:
            logits_NV = (logits_NV / self.soft_cap).tanh() * self.soft_cap
        return logits_NV * self.scale if self.scale != 1.0 else logits_NV


def scaling_of(config: Mapping[str, Any]) -> HeadScaling:
    """The scaling from a model's config: Gemma's final soft cap, Granite's divisor, Cohere's factor."""
    text = config.get("text_config") or config
    scale = 1.0
    if divisor := text.get("logits_scaling"):
        scale = 1.0 / float(divisor)
    elif factor := text.get("logit_scale"):
        scale = float(factor)
    cap = text.get("final_logit_softcapping")
    return HeadScaling(float(cap) if cap else None, scale)


def head_contents(tensors: Mapping[str, torch.Tensor], scaling: HeadScaling) -> dict[str, torch.Tensor]:
    """The tensors of the file, by name."""
    import torch

    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    contents["scale"] = torch.tensor(scaling.scale)
    if scaling.soft_cap is not None:
        contents["soft_cap"] = torch.tensor(scaling.soft_cap)
    return contents
