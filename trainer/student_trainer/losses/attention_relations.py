"""Attention-relation distillation: KL(teacher relations || student relations) of Q, K and V. Called by
`attention_term`.

Relations are computed from states, never from attention maps: the entries of a map lie in [0, 1], so relations of maps
are nearly uniform for any model, and their KL is at most 1 / (2T). The definitions are in
`teacher_proto.compute.relations`.

Documents are separate sequences, so a packed row is split into its documents and padding is never read. A document
takes R blocks of [rows, T] at a time; the gradient is computed in closed form along with the value, block by block, so
that no [T, T] array is ever held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_proto.compute.relations import (
    PARTS,
    QKV,
    RelationForm,
    log_relation_rows,
    relation_form,
    similarity_factor,
    similarity_rows,
)

# Relation entries per block: 32 MiB in float32 for each of about six arrays.
BLOCK_ENTRIES = 2**23


@dataclass(frozen=True)
class RelationLoss:
    """`total` / `count` is the loss of its form; both add up over micro batches.

    total: differentiable float32 scalar. per_part: the contributions of query, key and value, detached.
    per_document_D, counts_D: the contribution of each document, differentiable, and its number of positions.
    count: the number of positions of all documents.

    Over all positions of the batch, form official is the sum over Q, K, V of the KL averaged over positions and
    relation heads, divided by R (as the released code does for one layer). paper and minilm: without that division.
    """

    total: Tensor
    per_part: dict[str, Tensor]
    per_document_D: Tensor
    counts_D: tuple[int, ...]

    @property
    def count(self) -> int:
        return sum(self.counts_D)


def attention_relations(
    student: QKV, teacher: QKV | Sequence[QKV], *, form: str | RelationForm, relation_heads: int,
    document_ids_BT: np.ndarray | Tensor | None = None,
) -> RelationLoss:  # fmt: skip
    """The relation loss of a packed batch.

    `student`: [B, T, H, dh] of one layer. `teacher`: the same layout with its own H and dh, or one QKV of
    [T_document, H, dh] per document, ordered by row and then from left to right.
    `document_ids_BT`: constant and not negative within a document, negative for padding; None: a row is one document.
    Raises ValueError if R does not divide a width, or the teacher's documents do not match the student's.
    """
    chosen = relation_form(form)
    spans = document_spans(document_ids_BT, student.query.shape[:2])
    documents = _teacher_documents(teacher, spans, student.query.shape[:2])
    weight = 1.0 / relation_heads ** (2 if chosen.per_head else 1)
    parts_DP: list[Tensor] = []
    counts_D = []
    for (row, start, stop), document in zip(spans, documents, strict=True):
        summands = []
        for part in PARTS:
            ours_RTd, theirs_RTd = (
                similarity_factor(states_THd, form=chosen, relation_heads=relation_heads)
                for states_THd in (getattr(student, part)[row, start:stop], getattr(document, part))
            )
            divergence = _BlockwiseDivergence.apply(ours_RTd, theirs_RTd.to(ours_RTd.device), chosen)
            summands.append(weight * divergence)
        parts_DP.append(torch.stack(summands))
        counts_D.append(stop - start)
    table_DP = torch.stack(parts_DP) if parts_DP else student.query.new_zeros((0, len(PARTS)), dtype=torch.float32)
    return RelationLoss(
        total=table_DP.sum(),
        per_part=dict(zip(PARTS, table_DP.detach().sum(0), strict=True)),
        per_document_D=table_DP.sum(1),
        counts_D=tuple(counts_D),
    )


def document_spans(document_ids_BT: np.ndarray | Tensor | None, shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """(row, start, stop) of every document: each run of one id that is not negative."""
    batch, length = shape
    if document_ids_BT is None:
        return [(row, 0, length) for row in range(batch)]
    ids_BT = np.asarray(document_ids_BT.cpu() if isinstance(document_ids_BT, Tensor) else document_ids_BT)
    if ids_BT.shape != (batch, length):
        raise ValueError(f"document ids: got shape {ids_BT.shape}, expected the student's {(batch, length)}")
    spans = []
    for row in range(batch):
        # A document is a run of one id: it begins wherever the id changes.
        edges = [0, *(np.flatnonzero(np.diff(ids_BT[row])) + 1).tolist(), length]
        spans += [(row, a, b) for a, b in itertools.pairwise(edges) if ids_BT[row, a] >= 0]
    return spans


def _teacher_documents(
    teacher: QKV | Sequence[QKV], spans: list[tuple[int, int, int]], shape: Sequence[int]
) -> list[QKV]:
    """The teacher's states for each span. ValueError if their number or lengths differ from the student's."""
    if isinstance(teacher, QKV):
        if tuple(teacher.query.shape[:2]) != tuple(shape):
            raise ValueError(f"teacher states are {tuple(teacher.query.shape[:2])}, the student's {tuple(shape)}")
        return [QKV(*(part[row, start:stop] for part in teacher)) for row, start, stop in spans]
    if len(teacher) != len(spans):
        raise ValueError(f"the teacher returned {len(teacher)} documents, but the student's batch has {len(spans)}")
    for index, (document, (_, start, stop)) in enumerate(zip(teacher, spans, strict=True)):
        length = document.query.shape[0]
        if length != stop - start:
            raise ValueError(f"document {index}: the teacher saw {length} tokens, the student {stop - start}")
    return list(teacher)


class _BlockwiseDivergence(torch.autograd.Function):
    """Sum of KL over relation heads and positions, with its gradient with respect to the student's factor A.

    With S = A A^T, p = softmax(S) and t the teacher's relations: d KL / d S = p * sum(t) - t. Where p is below the
    form's floor, its logarithm is a constant and its t drops out of both terms. dA = dS A + dS^T A.
    """

    @staticmethod
    def forward(ctx: Any, factor_RTd: Tensor, teacher_RTd: Tensor, form: RelationForm) -> Tensor:
        relation_heads, length, _ = factor_RTd.shape
        rows_T = torch.arange(length, device=factor_RTd.device)
        total = factor_RTd.new_zeros(())
        gradient_RTd = torch.zeros_like(factor_RTd) if ctx.needs_input_grad[0] else None
        with torch.autocast(factor_RTd.device.type, enabled=False):
            for rows_r in rows_T.split(max(1, BLOCK_ENTRIES // (relation_heads * length))):
                # S = A_r A^T for a block of rows r: [R, r, T], never the whole [T, T] map.
                similarity_RrT = similarity_rows(factor_RTd, rows_r, form)
                value, slope_RrT = _divergence(similarity_RrT, log_relation_rows(teacher_RTd, rows_r, form), form)
                total += value
                if gradient_RTd is not None:
                    block_Rrd = factor_RTd.index_select(1, rows_r)
                    # dA gets dS A at the rows r and dS^T A_r at all T: every position is both query and key.
                    gradient_RTd.index_add_(1, rows_r, slope_RrT @ factor_RTd)
                    gradient_RTd.baddbmm_(slope_RrT.transpose(1, 2), block_Rrd)
        if gradient_RTd is not None:
            ctx.save_for_backward(gradient_RTd)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_RTd,) = ctx.saved_tensors
        # The gradient was computed with the value; here it is only scaled.
        return gradients[0] * gradient_RTd, None, None


def _divergence(similarity_RrT: Tensor, log_teacher_RrT: Tensor, form: RelationForm) -> tuple[Tensor, Tensor]:
    """KL(teacher || softmax(similarity)) summed over everything, and its derivative with respect to the similarity."""
    log_student_RrT = similarity_RrT.log_softmax(dim=-1)
    student_RrT = log_student_RrT.exp()
    teacher_RrT = log_teacher_RrT.exp()
    pulled_RrT = teacher_RrT
    if form.floor:
        floor = math.log(form.floor)
        # Below the floor the student's logarithm is a constant, so the teacher's mass there has no gradient.
        pulled_RrT = teacher_RrT * (log_student_RrT >= floor)
        log_student_RrT = log_student_RrT.clamp(min=floor)
    terms_RrT = teacher_RrT * (log_teacher_RrT - log_student_RrT)
    # A masked or vanishing teacher probability adds nothing; its logarithms are -inf on both sides.
    value = terms_RrT.masked_fill(teacher_RrT == 0, 0.0).sum()
    # d KL / d S = softmax(S) sum t - t, row by row, over the t above the floor.
    return value, student_RrT * pulled_RrT.sum(dim=-1, keepdim=True) - pulled_RrT
