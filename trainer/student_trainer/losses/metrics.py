"""The loss metrics of a batch: sums of every term by source, accumulated without waiting for the device.

Used by `loop` and `evaluator`; the other metrics of a step are in `reporting.step_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.losses.checks import DeferredCheck, flags_of, raise_failed
from student_trainer.losses.terms import Term
from student_trainer.losses.values import HeadLoss
from student_trainer.ranks import ALONE, Ranks


@dataclass(frozen=True)
class LossMetrics:
    """Means in nats over the tokens that count for each term; `loss` is what was differentiated.

    `tokens`: what the loss was divided by, see `View.count`. `terms`: means without coefficients, weighted where labels
    have weights. `weighted`: each term's summand of `loss`. `by_source`: source -> term -> mean, plus "tokens", the
    number of labels. `grad_norm`: before clipping; 0 if no gradient was computed.
    """

    tokens: int
    loss: float
    terms: Mapping[str, float]
    weighted: Mapping[str, float]
    by_source: Mapping[str, Mapping[str, float]]
    grad_norm: float

    def by_name(self) -> dict[str, float]:
        """The metrics by their names in metrics.jsonl."""
        return {
            "loss": self.loss,
            **{f"loss/{name}": value for name, value in self.terms.items()},
            **{f"weighted/{name}": value for name, value in self.weighted.items()},
            **{
                f"source/{source}/{name}": value
                for source, values in self.by_source.items()
                for name, value in values.items()
            },
        }

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.loss, self.grad_norm, *self.terms.values()))


class LossSums:
    """Adds up micro batches. `per_term` keeps the values of every token until the step is over, for a dump."""

    def __init__(self, terms: Sequence[Term], sources: Sequence[str]):
        self._terms, self._sources = tuple(terms), tuple(sources)
        self._tokens = 0
        self._sums: list[Tensor] = []  # [terms, 3, sources]: weighted sums, weights, and counts
        self._deferred: list[DeferredCheck] = []
        self.per_term: list[dict[str, Tensor]] = []

    def add(self, loss: HeadLoss, micro: MicroBatch) -> None:
        self._tokens += micro.view.count
        weights_N = micro.view.weights_N
        self._deferred += loss.deferred
        self.per_term.append(loss.per_term)
        width = len(self._sources)
        parts = []
        for term in self._terms:
            # In float64, so that sums over millions of tokens stay exact enough in any order.
            values_N, counted_N = loss.per_term[term.name].double(), loss.counted[term.name].double()
            weighed_N = counted_N
            if weights_N is not None:
                values_N, weighed_N = values_N * weights_N, counted_N * weights_N
            values_3N = torch.stack([values_N, weighed_N, counted_N])
            # Each label adds to the column of its source.
            parts.append(values_3N.new_zeros(3, width).index_add(1, micro.sources_N, values_3N))
        self._sums.append(torch.stack(parts))

    def metrics(self, grad_norm: Tensor | None = None, ranks: Ranks = ALONE) -> LossMetrics:
        """The metrics over all ranks, each of which must call this. Only here does a step wait for the device, once.

        ValueError if a deferred check of the losses fails.
        """
        tokens = ranks.total(self._tokens)
        shape = len(self._terms), 3, len(self._sources)
        summed = ranks.add_up(torch.stack(self._sums).sum(0)) if self._sums else torch.zeros(shape, dtype=torch.float64)
        norm = torch.zeros(1) if grad_norm is None else grad_norm.detach().reshape(1)
        flags = flags_of(self._deferred) if self._deferred else norm[:0]
        # Flags, sums and norm in one copy from the device: each copy would wait for it.
        *flat, norm_value = torch.cat([flags.to(summed), summed.flatten(), norm.to(summed)]).tolist()
        raise_failed(self._deferred, flat[: len(flags)])
        flat = flat[len(flags) :]
        terms, weighted = {}, {}
        by_source: dict[str, dict[str, float]] = {}
        width = len(self._sources)
        for index, term in enumerate(self._terms):
            begin = 3 * index * width
            values, weights, counts = (flat[begin + part * width : begin + (part + 1) * width] for part in range(3))
            # Weighted mean over the rows that count for this term, which may be fewer than the batch's tokens.
            terms[term.name] = _mean(sum(values), sum(weights))
            # As in the loss: coefficient x sum / tokens of the batch, so that these add up to `loss`.
            weighted[term.name] = term.coefficient * _mean(sum(values), float(tokens))
            for name, value, weight, count in zip(self._sources, values, weights, counts, strict=True):
                if count:
                    by_source.setdefault(name, {})[term.name] = _mean(value, weight)
                    # The largest count of any term: a label loss counts all labels.
                    by_source[name]["tokens"] = max(by_source[name].get("tokens", 0), int(count))
        return LossMetrics(
            tokens=tokens,
            loss=sum(weighted.values()),
            terms=terms,
            weighted=weighted,
            by_source=by_source,
            grad_norm=norm_value,
        )


def _mean(total: float, count: float) -> float:
    return total / count if count else 0.0
