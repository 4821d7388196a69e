"""One call of `head.head_loss` as records: its arguments, its passes and its outcome. Made by `head`; read by `chunks`,
`passes` and the kernels of `fused`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.supports import SUPPORTS
from student_trainer.losses.terms import LabelTerm, TeacherTerm, TokenTerm

# Some rows of a call: their indices, or a slice.
Rows: TypeAlias = Tensor | slice


@dataclass(frozen=True)
class Pass:
    """Terms that share one softmax over the first `width` logits at `temperature`, and one support."""

    temperature: float
    width: int
    support: str | None
    terms: tuple[TeacherTerm, ...]
    label_terms: tuple[LabelTerm, ...] = ()


@dataclass(frozen=True)
class Job:
    """One call of `head.head_loss`, its arguments checked."""

    labels_N: Tensor
    teacher: TeacherRows | None
    terms: tuple[TokenTerm, ...]
    passes: tuple[Pass, ...]
    counted: dict[str, Tensor]
    shared: int
    softcap: float | None
    scale: float
    chunk_rows: int
    want_top1: bool
    wants_grad: bool
    compute: torch.dtype
    every_row: bool = False
    weights_N: Tensor | None = None


@dataclass
class Outcome:
    """What a call computes: values by term [terms, N], the most likely ids, and the requested gradients."""

    values_MN: Tensor
    top1_N: Tensor
    hidden_ND: Tensor | None = None
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None


class Between(Protocol):
    """What is computed between the matrix products of a chunk."""

    def run(self, start: int, rows_C: Rows, z_CV: Tensor, teacher_CW: Tensor | None) -> Tensor | None:
        """Writes the values into the outcome, given the products `z_CV` of the rows `rows_C`, the first of which is row
        `start` of those that count. Returns the gradient with respect to the products, if wanted; `z_CV` may be
        overwritten.
        """
        ...

    def finish(self) -> None:
        """Called when all chunks are done."""
        ...


def within(rows: Rows, part: slice) -> Rows:
    """The slice `part` of `rows`."""
    if isinstance(rows, slice):
        return slice(rows.start + part.start, rows.start + part.stop)
    return rows[part]


def plan_passes(terms: Sequence[TokenTerm], vocab_size: int, shared_vocab: int) -> tuple[Pass, ...]:
    """As few passes as the terms allow; label losses join a pass that computes their softmax anyway."""
    groups: dict[tuple[float, int, str | None], list[TeacherTerm]] = {}
    for term in terms:
        if isinstance(term, TeacherTerm):
            groups.setdefault((term.temperature, shared_vocab, term.support), []).append(term)
    labels = tuple(term for term in terms if isinstance(term, LabelTerm))
    # A pass at T = 1 over the student's whole vocabulary computes the label's softmax.
    host = next((key for key in groups if key[:2] == (1.0, vocab_size) and not is_dense(key[2])), None)
    if labels and host is None:
        host = (1.0, vocab_size, None)
        groups[host] = []
    return tuple(
        Pass(*key, terms=tuple(members), label_terms=labels if key == host else ()) for key, members in groups.items()
    )


def is_dense(support: str | None) -> bool:
    """Whether a pass compares whole vocabularies."""
    return support is not None and SUPPORTS[support].student == "vocabulary"
