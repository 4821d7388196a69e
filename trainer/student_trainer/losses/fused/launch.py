"""Launches the kernels of one call of `head.head_loss`: their inputs are laid out once, and each chunk launches them.
Made by `chunks`, where the hardware runs Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.fused.compare import compare
from student_trainer.losses.fused.divergences import KINDS
from student_trainer.losses.fused.gradient import gradient
from student_trainer.losses.fused.normalise import BUCKET, LABEL, PLAIN, RENORMALISE, normalise
from student_trainer.losses.plan import Job, Outcome, Pass, Rows
from student_trainer.losses.projection import HeadProjection
from student_trainer.losses.supports import SUPPORTS, read_support, tail_of
from student_trainer.losses.terms import TeacherTerm, TokenTerm

# Logits that a kernel's program reads at a time (half as many of each where it reads two models'), and the warps that
# share them: so many that every number stays in a register.
BLOCK, WARPS = 4096, 8


@dataclass(frozen=True)
class Support:
    """One support as `normalise` reads it: ids [R, K], -1 for none, and for each softmax that uses it logprobs [tables,
    R, K] and the two numbers of `tail_of` [tables, 2, R]. `at_RK`: the gradient at the ids, written by the kernel.
    """

    ids_RK: Tensor
    logprobs_PRK: Tensor
    tails_P2R: Tensor
    at_RK: Tensor


class FusedTerms:
    """What lies between the products of a chunk, as kernels: for the values one launch per support and one for whole
    vocabularies, then one for the gradient. R are the rows of the call that count, `rows_R` of all; they come in
    consecutive chunks of at most `height` rows.
    """

    def __init__(
        self, job: Job, head: HeadProjection, teacher_head: HeadProjection | None, outcome: Outcome, rows_R: Rows,
        height: int,
    ):  # fmt: skip
        self._outcome, self._rows_R = outcome, rows_R
        labels_R = job.labels_N[rows_R]
        # [M, R] bool: does row r count for term m? A term may leave out rows that others need.
        counted_MR = torch.stack([job.counted[term.name][rows_R] for term in job.terms])
        teacher = job.teacher if job.teacher is None or job.every_row else job.teacher.select(rows_R)
        passes, terms = job.passes, job.terms
        self._wants_grad = job.wants_grad
        # The gradient is written over the products, unless the backward products take it in another dtype.
        self._out_CV: Tensor | None = None
        if job.wants_grad and head.back_dtype != head.accumulator:
            self._out_CV = torch.empty(height, len(head.weight_VD), dtype=head.back_dtype, device=job.labels_N.device)
        self._top1_R = torch.empty_like(labels_R) if job.want_top1 else None
        self._head, self._teacher_head = head, teacher_head
        self._rows, self._vocab, self._shared = len(labels_R), len(head.weight_VD), job.shared
        # An ignored label (-100) must not be read outside the row: it counts for nothing, wherever it points.
        self._labels_R = labels_R.clamp(0, self._vocab - 1)
        self._counted_MR = counted_MR
        index = {term.name: number for number, term in enumerate(terms)}
        dense = [name for name, support in SUPPORTS.items() if support.student == "vocabulary"]
        # Passes on a support or the label are computed by `normalise`, those over whole vocabularies by `compare`.
        self._sparse = [each for each in passes if each.support not in dense]
        self._names = list(dict.fromkeys(each.support for each in self._sparse if each.support is not None))
        self._supports = [self._support(name, teacher, index) for name in self._names]
        self._dense = [each for each in passes if each.support in dense]
        self._dense_terms = tuple(
            (KINDS[term.kind], number, index[term.name], term.squared, *_mixture(term))
            for number, each in enumerate(self._dense)
            for term in each.terms
        )
        self._weights_MR = torch.stack(
            [row_R * (term.coefficient * term.squared)
             for row_R, term in zip(counted_MR.to(head.accumulator), terms, strict=True)]
        )  # fmt: skip
        if job.weights_N is not None:
            self._weights_MR *= job.weights_N[rows_R].to(head.accumulator)
        self._index = index
        self._values_MR = torch.zeros_like(self._weights_MR)
        # From `normalise` to `gradient`, by softmax and row: the logsumexp of all ids outside the support, and the one
        # number that, times q / (their mass), is their gradient.
        self._rest_SR = self._weights_MR.new_zeros(max(1, len(self._sparse)), self._rows)
        self._row_SR = torch.zeros_like(self._rest_SR)
        # What `gradient` adds at the label: minus the weight of each label loss.
        self._at_label_R = self._weights_MR.new_zeros(self._rows)

    def run(self, start: int, rows_C: Rows, z_CV: Tensor, teacher_CW: Tensor | None) -> Tensor | None:
        """See `plan.Between`."""
        out_CV: Tensor | None = None
        if self._wants_grad:
            out_CV = z_CV if self._out_CV is None else self._out_CV[: len(z_CV)]
        top1_C = None if self._top1_R is None else self._top1_R[start : start + len(z_CV)]
        for number in range(max(1, len(self._supports))):
            if self._sparse or top1_C is not None:
                self._normalise(number, start, z_CV, top1_C if number == 0 else None)
        # The order matters: `gradient` overwrites the logits that the other two read.
        lse_DR, totals_MR = self._compare(start, z_CV, teacher_CW) if self._dense else (z_CV, z_CV)
        if out_CV is not None:
            self._gradient(start, z_CV, teacher_CW, out_CV, lse_DR, totals_MR)
        return out_CV

    def finish(self) -> None:
        """Write values and most likely ids into the outcome, once all chunks are done."""
        # `where` and not a product: an uncounted row may hold inf or NaN, and 0 x NaN is NaN.
        self._outcome.values_MN[:, self._rows_R] = torch.where(self._counted_MR, self._values_MR, 0.0)
        if self._top1_R is not None:
            self._outcome.top1_N[self._rows_R] = self._top1_R

    def _support(self, name: str, teacher: TeacherRows | None, index: dict[str, int]) -> Support:
        assert teacher is not None
        logprobs, tails = [], []
        ids_RK: Tensor | None = None
        for each in self._of(name):
            # One table of logprobs per temperature; it has LOG_FLOOR at an id that only another table uses.
            counted_R = torch.stack([self._counted_MR[index[term.name]] for term in each.terms]).any(0)
            rows = read_support(teacher, name, each.temperature, each.width, counted_R)
            # -1 marks a slot without an id; the temperatures of a support share its ids and differ in their logprobs.
            ids_RK = torch.where(rows.live_NK, rows.ids_NK, -1 if ids_RK is None else ids_RK)
            logprobs.append(rows.logprobs_NK.to(self._head.accumulator))
            tails.append(torch.stack(tail_of(rows, each.width)).to(self._head.accumulator))
        assert ids_RK is not None
        return Support(ids_RK.to(torch.int32), torch.stack(logprobs), torch.stack(tails), torch.zeros_like(logprobs[0]))

    def _of(self, name: str | None) -> list[Pass]:
        return [each for each in self._sparse if each.support == name]

    def _normalise(self, number: int, start: int, z_CV: Tensor, top1_C: Tensor | None) -> None:
        """The softmaxes of one support; the first launch also has those without a support."""
        name = self._names[number] if self._names else None
        own = self._of(name)
        chosen = own + (self._of(None) if number == 0 and name is not None else [])
        # A launch without a support gets other tensors in place of the tables, and reads none of them.
        if name is None:
            softmaxes = [(1.0 / each.temperature, self._wide(each), -1, self._sparse.index(each)) for each in chosen]
            ids_CK, at_CK, logprobs_PCK, tails_P2C, width = self._labels_R, z_CV, z_CV, z_CV, 0
        else:
            support = self._supports[number]
            softmaxes = [
                (1.0 / each.temperature, self._wide(each), table if each.support else -1, self._sparse.index(each))
                for table, each in enumerate(chosen)
            ]
            ids_CK, at_CK, width = support.ids_RK[start:], support.at_RK[start:], support.ids_RK.shape[1]
            logprobs_PCK, tails_P2C = support.logprobs_PRK[:, start:], support.tails_P2R[:, :, start:]
        terms = [
            (
                KINDS.get(term.kind, 0),
                number_,
                self._index[term.name],
                _form(term),
                term.squared,
                *_mixture(term),
                softmaxes[number_][2],
            )
            for number_, each in enumerate(chosen)
            for term in (*each.terms, *each.label_terms)
        ]
        constants = self._constants()
        normalise[(len(z_CV),)](
            z_CV, z_CV.stride(0), constants.pop("bias_ptr"), self._labels_R[start:], ids_CK, logprobs_PCK, tails_P2C,
            self._weights_MR[:, start:], self._values_MR[:, start:], self._rest_SR[:, start:], self._row_SR[:, start:],
            at_CK, self._at_label_R[start:], z_CV if top1_C is None else top1_C,
            self._rows, width, self._vocab, self._shared, SOFTMAXES=tuple(softmaxes), TERMS=tuple(terms),
            WANT_TOP=top1_C is not None, HAS_LABEL=any(each.label_terms for each in chosen),
            S_PAD=_padded(len(softmaxes), 1), K_PAD=_padded(width, 16), **constants, **_launch(BLOCK),
        )  # fmt: skip

    def _compare(self, start: int, z_CV: Tensor, teacher_CW: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher_CW is not None
        # For this chunk only: `gradient` reads them right after.
        lse_DR = self._rest_SR.new_empty(2 * len(self._dense), self._rows)
        totals_MR = self._rest_SR.new_empty(len(self._dense_terms), self._rows)
        constants = self._constants() | self._teacher_constants()
        compare[(len(z_CV),)](
            z_CV, z_CV.stride(0), constants.pop("bias_ptr"), teacher_CW, teacher_CW.stride(0),
            constants.pop("teacher_bias_ptr"), self._weights_MR[:, start:], self._values_MR[:, start:],
            lse_DR[:, start:], totals_MR[:, start:], self._rows, self._shared, TEMPERATURES=self._temperatures(),
            TERMS=self._dense_terms, S_PAD=_padded(len(self._dense), 1), M_PAD=_padded(len(self._dense_terms), 1),
            **constants, **_launch(BLOCK // 2),
        )  # fmt: skip
        return lse_DR, totals_MR

    def _gradient(
        self, start: int, z_CV: Tensor, teacher_CW: Tensor | None, out_CV: Tensor, lse_DR: Tensor, totals_MR: Tensor
    ) -> None:
        softmaxes = tuple(
            (1.0 / each.temperature, self._wide(each), self._names.index(each.support) if each.support else -1)
            for each in self._sparse
        )
        groups: list[Any] = []
        for support in self._supports:
            groups += [support.ids_RK[start:], support.at_RK[start:], support.ids_RK.shape[1]]
        # The kernel takes three groups; other tensors stand in for missing ones, which have no ids.
        groups += [self._labels_R, self._rest_SR, 0] * (3 - len(self._supports))
        constants = self._constants() | self._teacher_constants()
        teacher = z_CV if teacher_CW is None else teacher_CW
        gradient[(len(z_CV),)](
            z_CV, z_CV.stride(0), out_CV, out_CV.stride(0), constants.pop("bias_ptr"), self._labels_R[start:],
            self._at_label_R[start:], *groups, self._rest_SR[:, start:], self._row_SR[:, start:],
            self._weights_MR[:, start:], teacher, teacher.stride(0), constants.pop("teacher_bias_ptr"),
            lse_DR[:, start:] if self._dense else lse_DR, totals_MR[:, start:] if self._dense else totals_MR,
            self._rows, self._vocab, self._shared, SOFTMAXES=softmaxes,
            GROUPS=tuple(_padded(support.ids_RK.shape[1], 16) for support in self._supports),
            DENSE=self._dense_terms, TEMPERATURES=self._temperatures(), **constants, **_launch(BLOCK),
        )  # fmt: skip

    def _temperatures(self) -> tuple[tuple[float], ...]:
        return tuple((1.0 / each.temperature,) for each in self._dense)

    def _wide(self, each: Pass) -> int:
        return int(each.width == self._vocab)

    def _constants(self) -> dict[str, Any]:
        return {"bias_ptr": _bias(self._head, self._labels_R), "HEAD": _head(self._head)}

    def _teacher_constants(self) -> dict[str, Any]:
        head = self._teacher_head or self._head
        return {"teacher_bias_ptr": _bias(head, self._labels_R), "TEACHER": _head(head)}


def _head(head: HeadProjection) -> tuple[int, float, float]:
    """HEAD of `row_functions.to_logits`."""
    return int(head.bias_V is not None), float(head.scale), 0.0 if head.softcap is None else float(head.softcap)


def _bias(head: HeadProjection, unused: Tensor) -> Tensor:
    return unused if head.bias_V is None else head.bias_V


def _form(term: TokenTerm) -> int:
    """How `normalise` computes a term: at the label, on the ids alone, renormalised, or with the rest in a bucket."""
    if not isinstance(term, TeacherTerm):
        return int(LABEL.value)
    if term.plain:
        return int(PLAIN.value)
    return int(RENORMALISE.value if term.renormalises else BUCKET.value)


def _mixture(term: TokenTerm) -> tuple[float, float, float]:
    """(log A, log(1 - A), A) for the share A in a mixture of the two distributions; arbitrary for other kinds."""
    share = getattr(term.settings, "beta" if term.kind == "jsd" else "alpha", 0.5)
    return math.log(share), math.log1p(-share), share


def _padded(count: int, least: int) -> int:
    return max(least, triton.next_power_of_2(max(1, count)))


def _launch(block: int) -> dict[str, int]:
    """Launch options. Multiply-adds are fused, which is more exact, whatever Triton's default."""
    return {"BLOCK": block, "num_warps": WARPS, "enable_fp_fusion": True}
