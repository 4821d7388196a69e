"""What a run asks of its losses: one `Term` for each. Made from the trainer's settings, read by `head.head_loss`.

The reduction, once for all terms: a term's value is a sum over the rows that count for it of
coefficient * (temperature^2 if `temperature_squared`) * divergence in nats. The loop divides once by the global count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

Support = Literal["top_k", "gather", "sampled", "full"]

# The supports on which each kind is defined. `top_k_kl` is forward_kl on the served top K, under the name users know.
SUPPORTS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "top_k_kl": ("top_k",),
    "forward_kl": ("top_k", "gather", "full"),
    "reverse_kl": ("top_k", "gather", "full"),
    "jsd": ("top_k", "gather", "full"),
    "skewed_kl": ("top_k", "gather", "full"),
    "skewed_reverse_kl": ("top_k", "gather", "full"),
    "tvd": ("top_k", "gather", "full"),
    "sampled": ("sampled",),
    "attention_relations": (),
}
# Kinds that read nothing that the teacher says of tokens. `attention_relations`, of a layer's states, is no term of
# `head_loss`.
OFF_TOKENS = ("cross_entropy", "attention_relations")


@dataclass(frozen=True)
class Term:
    """One summand of the loss.

    `tail`: "bucket" gives the mass outside the support a bucket of its own on both sides, so student mass there is
    pressed; "renormalise" compares the two distributions given that the token is in the support.
    `temperature_squared`: multiply value and gradient by T^2 (Hinton's convention).
    `beta`: jsd's weight of the teacher. `alpha`: the skewed divergences' share of the first distribution.
    `support`: where the teacher's probabilities come from; "full" needs its hidden states and head.
    Raises ValueError for a kind that is not known, a support that the kind has not, or a number out of range.
    """

    name: str
    kind: str
    coefficient: float
    temperature: float = 1.0
    tail: Literal["bucket", "renormalise"] = "bucket"
    temperature_squared: bool = False
    beta: float = 0.5
    alpha: float = 0.1
    support: Support = "top_k"

    def __post_init__(self) -> None:
        if self.kind not in SUPPORTS:
            raise ValueError(f"loss '{self.name}': got kind '{self.kind}', expected one of {sorted(SUPPORTS)}")
        if self.kind == "sampled" and self.support == "top_k":
            object.__setattr__(self, "support", "sampled")
        supports = SUPPORTS[self.kind]
        if supports and self.support not in supports:
            raise ValueError(
                f"loss '{self.name}' of kind '{self.kind}': got support '{self.support}', expected one of {supports}"
            )
        if not math.isfinite(self.coefficient):
            raise ValueError(f"loss '{self.name}': got coefficient {self.coefficient}, expected a finite number")
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ValueError(f"loss '{self.name}': got temperature {self.temperature}, expected a number above 0")
        if self.kind == "cross_entropy" and self.temperature != 1.0:
            raise ValueError(f"loss '{self.name}': cross_entropy has temperature 1, got {self.temperature}")
        if self.tail not in ("bucket", "renormalise"):
            raise ValueError(f"loss '{self.name}': got tail '{self.tail}', expected 'bucket' or 'renormalise'")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"loss '{self.name}': got beta {self.beta}, expected a number between 0 and 1; "
                "the limits are the kinds forward_kl (0) and reverse_kl (1)"
            )
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"loss '{self.name}': got alpha {self.alpha}, expected a number between 0 and 1")

    @property
    def reads_tokens(self) -> bool:
        """Whether the term compares with what the teacher says of each token."""
        return self.kind not in OFF_TOKENS

    @property
    def squared(self) -> float:
        """T^2 where the term asks for it, else 1."""
        return self.temperature**2 if self.temperature_squared else 1.0

    def without_effect(self) -> list[str]:
        """Names of the settings that differ from their default and change nothing for this kind."""
        used = {"name", "kind", "coefficient"}
        if self.reads_tokens:
            used |= {"temperature", "support"}
            if self.temperature != 1.0:
                used.add("temperature_squared")
        if self.support in ("top_k", "gather") and self.reads_tokens and self.kind != "sampled":
            used.add("tail")
        if self.kind == "jsd":
            used.add("beta")
        if self.kind in ("skewed_kl", "skewed_reverse_kl"):
            used.add("alpha")
        return [
            field.name
            for field in fields(self)
            if field.name not in used and getattr(self, field.name) != field.default
        ]
