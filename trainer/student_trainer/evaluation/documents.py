"""Held-out metrics per document, for paired comparison of two runs. Called by `evaluator`.

Tokens of one document are not independent, documents are: whether two students differ by more than chance is judged by
the spread of their differences over documents. Written to `documents.jsonl`, one line per document and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from student_trainer.batch.batch import Batch
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.evaluation.records import DocumentMetrics
from student_trainer.losses.values import HeadLoss
from student_trainer.ranks import Ranks

COLUMNS = ("tokens", "cross_entropy", "kl", "agreed")


class DocumentSums:
    """Accumulates the micro batches of one source."""

    def __init__(self, source: str, has_teacher: bool):
        self._source, self._has_teacher = source, has_teacher
        self._parts: list[tuple[list[str], Tensor]] = []  # documents, and the COLUMNS of each, on the device

    def add(self, batch: Batch, micro: MicroBatch, loss: HeadLoss, agrees_N: Tensor | None) -> None:
        """`agrees_N`: where student and teacher have the same likeliest token; None without a teacher."""
        if not len(micro.view.labels_N):
            return
        rows = range(micro.first_row, micro.first_row + micro.rows)
        keys = [document.key for document in batch.documents if document.row in rows]
        zeros_N = torch.zeros_like(loss.per_term["cross_entropy"])
        weights_N = zeros_N + 1 if micro.view.weights_N is None else micro.view.weights_N
        values_4N = torch.stack([
            weights_N, weights_N * loss.per_term["cross_entropy"], weights_N * loss.per_term.get("kl", zeros_N),
            zeros_N if agrees_N is None else weights_N * agrees_N,
        ]).double()  # fmt: skip
        sums_4D = values_4N.new_zeros(len(COLUMNS), len(keys)).index_add_(1, micro.documents_N, values_4N)
        self._parts.append((keys, sums_4D))

    def metrics(self, ranks: Ranks) -> list[DocumentMetrics]:
        """The metrics over all ranks, which must all call it, sorted by document."""
        own: dict[str, Tensor] = {}
        for keys, sums_4D in self._parts:
            for key, sums_4 in zip(keys, sums_4D.cpu().T, strict=True):
                if sums_4[0]:
                    own[key] = own.get(key, torch.zeros_like(sums_4)) + sums_4
        together: dict[str, Tensor] = {}
        for mine in ranks.gather(own):
            for key, sums_4 in mine.items():
                together[key] = together.get(key, torch.zeros_like(sums_4)) + sums_4
        return [self._of(key, dict(zip(COLUMNS, together[key].tolist(), strict=True))) for key in sorted(together)]

    def _of(self, key: str, sums: Mapping[str, float]) -> DocumentMetrics:
        return DocumentMetrics(
            source=self._source,
            document=key,
            tokens=_number(sums["tokens"]),
            cross_entropy=sums["cross_entropy"],
            kl=sums["kl"] if self._has_teacher else None,
            agreed=_number(sums["agreed"]) if self._has_teacher else None,
        )


def _number(value: float) -> float:
    """As an int if it is integral."""
    return int(value) if value.is_integer() else value
