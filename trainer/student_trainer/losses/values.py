"""The values of all terms on a micro batch. Made by `head` and the students, summed by `metrics`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student_trainer.losses.checks import DeferredCheck
from student_trainer.losses.terms import Term


@dataclass(frozen=True)
class HeadLoss:
    """`total`: sum over terms and rows of coefficient * row weight * value; its gradient reaches hidden states, weight
    and bias.

    `per_term`: name -> [N] float32, unweighted values in nats (including T^2 if the term has it), 0 on rows that do not
    count. `counted`: name -> [N] bool, the rows that count. `top1_N`: the student's most likely ids, if requested; -1
    on rows that count for no term. `deferred`: the checks left to the caller; see `checks.raise_failed`.
    """

    total: Tensor
    per_term: dict[str, Tensor]
    counted: dict[str, Tensor]
    top1_N: Tensor | None = None
    deferred: tuple[DeferredCheck, ...] = ()

    def plus(self, term: Term, values_N: Tensor, weights_N: Tensor | None = None) -> HeadLoss:
        """A copy with another term, whose values were computed elsewhere, one a row; `weights_N` as in `head_loss`."""
        return replace(
            self,
            total=self.total + term.coefficient * (values_N.sum() if weights_N is None else values_N @ weights_N),
            per_term=self.per_term | {term.name: values_N.detach()},
            counted=self.counted | {term.name: torch.ones_like(values_N, dtype=torch.bool)},
        )

    def beside(self, other: HeadLoss) -> HeadLoss:
        """A copy with the terms of another call over the same labels."""
        return replace(
            self,
            total=self.total + other.total,
            per_term=self.per_term | other.per_term,
            counted=self.counted | other.counted,
            deferred=(*self.deferred, *other.deferred),
        )

    def count(self, name: str) -> Tensor:
        """How many rows count for the term `name`: a scalar tensor."""
        return self.counted[name].sum()
