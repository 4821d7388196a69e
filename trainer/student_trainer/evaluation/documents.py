"""Held-out figures document by document, so that two runs can be compared pair by pair. Called by `evaluator`.

Tokens of one document are alike, documents are not: whether two students differ by more than chance is judged by the
spread of their differences over documents. They go to `documents.jsonl`, a line for each document and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.batch.align import MicroBatch
from student_trainer.batch.batch import Batch
from student_trainer.losses.head import HeadLoss
from student_trainer.ranks import Ranks

COLUMNS = ("tokens", "cross_entropy", "kl", "agreed")


@dataclass(frozen=True)
class DocumentFigures:
    """Sums over the tokens of one held-out document that count, in nats; `kl`, `agreed` are None without a teacher."""

    source: str
    document: str
    tokens: int
    cross_entropy: float
    kl: float | None
    agreed: int | None


class DocumentSums:
    """Adds up the micro batches of one source."""

    def __init__(self, source: str, has_teacher: bool):
        self._source, self._has_teacher = source, has_teacher
        self._sums_D4: dict[str, Tensor] = {}  # by document: COLUMNS

    def add(self, batch: Batch, micro: MicroBatch, loss: HeadLoss, agrees_N: Tensor | None) -> None:
        """`agrees_N`: where student and teacher put the same token first, None without a teacher."""
        if not len(micro.labels_N):
            return
        keys = _document_keys(batch, micro)
        zeros_N = torch.zeros_like(loss.per_term["cross_entropy"])
        values_4N = torch.stack([
            zeros_N + 1, loss.per_term["cross_entropy"], loss.per_term.get("kl", zeros_N),
            zeros_N if agrees_N is None else agrees_N,
        ]).double()  # fmt: skip
        index_N = _document_of_each_label(micro, len(keys))
        sums_4D = values_4N.new_zeros(len(COLUMNS), len(keys)).index_add_(1, index_N, values_4N).cpu()
        for key, sums_4 in zip(keys, sums_4D.T, strict=True):
            if sums_4[0]:
                self._sums_D4[key] = self._sums_D4.get(key, torch.zeros_like(sums_4)) + sums_4

    def figures(self, ranks: Ranks) -> list[DocumentFigures]:
        """Of all ranks together, which all must call; ordered by document."""
        together: dict[str, Tensor] = {}
        for mine in ranks.gather(self._sums_D4):
            for key, sums_4 in mine.items():
                together[key] = together.get(key, torch.zeros_like(sums_4)) + sums_4
        return [self._of(key, dict(zip(COLUMNS, together[key].tolist(), strict=True))) for key in sorted(together)]

    def _of(self, key: str, sums: Mapping[str, float]) -> DocumentFigures:
        return DocumentFigures(
            self._source, key, int(sums["tokens"]), sums["cross_entropy"], sums["kl"] if self._has_teacher else None,
            int(sums["agreed"]) if self._has_teacher else None,
        )  # fmt: skip


def _document_keys(batch: Batch, micro: MicroBatch) -> list[str]:
    """Of the micro batch's documents, by row, then by their ordinal in it: as `_document_of_each_label` counts them."""
    rows = range(micro.first_row, micro.first_row + len(micro.tokens_BT))
    return [document.key for document in batch.documents if document.row in rows]


def _document_of_each_label(micro: MicroBatch, count: int) -> Tensor:
    """[N] int64: which of the micro batch's `count` documents a label belongs to."""
    ids_BT = micro.document_ids_BT.long()
    # Documents that lie in the rows above.
    above_B = (ids_BT.amax(1) + 1).cumsum(0).roll(1)
    above_B[0] = 0
    index_N = (ids_BT + above_B[:, None]).flatten()[micro.rows_N]
    assert int(index_N.max()) < count, (int(index_N.max()), count)
    return index_N
