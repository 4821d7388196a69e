"""What a step did, in figures: sums of every loss term by source, gathered without making the device wait. Used by
`loop` and `evaluator`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from student_trainer.batch.align import MicroBatch
from student_trainer.losses.head import HeadLoss
from student_trainer.losses.terms import Term
from student_trainer.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from student_trainer.optim.qk_clip import ClipReport
    from student_trainer.rollouts.prompts import WrittenFigures


@dataclass(frozen=True)
class StepFigures:
    """Means in nats over the tokens that count for each term; `loss` is what was differentiated.

    `terms`: raw means. `weighted`: the term's share of `loss`. `by_source`: source -> term -> mean, and "tokens".
    `coefficients` where they change in the run; `gradient_shares` where they were measured, see `losses.weighting`.
    `wrote_s`: seconds in which the student wrote a later batch; `written`: of a batch that it wrote.
    """

    tokens: int
    loss: float
    terms: Mapping[str, float]
    weighted: Mapping[str, float]
    by_source: Mapping[str, Mapping[str, float]]
    grad_norm: float
    waited_s: float
    rates: Mapping[str, float] = field(default_factory=dict)
    clipped: ClipReport | None = None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    gradient_shares: Mapping[str, float] = field(default_factory=dict)
    wrote_s: float | None = None
    written: WrittenFigures | None = None

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.loss, self.grad_norm, *self.terms.values()))


class Tally:
    """Adds up micro batches. `per_term` keeps the values of every token until the step is over, for a dump."""

    def __init__(self, terms: Sequence[Term], sources: Sequence[str]):
        self._terms, self._sources = tuple(terms), tuple(sources)
        self._tokens = 0
        self._sums: list[Tensor] = []  # [terms, 2, sources]: sums and counts
        self.per_term: list[dict[str, Tensor]] = []

    def add(self, loss: HeadLoss, micro: MicroBatch) -> None:
        self._tokens += len(micro.labels_N)
        self.per_term.append(loss.per_term)
        width = len(self._sources)
        parts = []
        for term in self._terms:
            values_2N = torch.stack([loss.per_term[term.name].double(), loss.counted[term.name].double()])
            zeros_2S = values_2N.new_zeros(2, width)
            parts.append(zeros_2S.index_add(1, micro.sources_N, values_2N))
        self._sums.append(torch.stack(parts))

    def figures(self, grad_norm: Tensor | None = None, waited_s: float = 0.0, ranks: Ranks = ALONE) -> StepFigures:
        """Those of all ranks together, which all must call; the longest wait. The one place where a step waits for
        the device.
        """
        tokens = ranks.total(self._tokens)
        if self._sums:
            sums = ranks.add_up(torch.stack(self._sums).sum(0)).tolist()
        else:
            sums = [[[0.0] * len(self._sources)] * 2 for _ in self._terms]
        terms, weighted = {}, {}
        by_source: dict[str, dict[str, float]] = {}
        for term, (values, counts) in zip(self._terms, sums, strict=True):
            terms[term.name] = _mean(sum(values), sum(counts))
            weighted[term.name] = term.coefficient * _mean(sum(values), float(tokens))
            for name, value, count in zip(self._sources, values, counts, strict=True):
                if count:
                    by_source.setdefault(name, {})[term.name] = value / count
                    by_source[name]["tokens"] = max(by_source[name].get("tokens", 0), int(count))
        return StepFigures(
            tokens=tokens,
            loss=sum(weighted.values()),
            terms=terms,
            weighted=weighted,
            by_source=by_source,
            grad_norm=float(grad_norm) if grad_norm is not None else 0.0,
            waited_s=ranks.largest(waited_s),
        )


def _mean(total: float, count: float) -> float:
    return total / count if count else 0.0
