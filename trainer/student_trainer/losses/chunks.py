"""Runs the head and its losses over a call's rows: in chunks for the matrix products, and for all else in blocks of a
chunk.

Called by `head`. On a CPU a chunk must have many rows, or the products are slow, and a block must fit the caches, or
every pass over the logits waits for memory. On a GPU the kernels of `fused` process a whole chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from student_trainer.losses.passes import Block, run_pass
from student_trainer.losses.plan import Between, Job, Outcome, Rows, within
from student_trainer.losses.projection import HeadProjection
from student_trainer.losses.supports import SUPPORTS
from student_trainer.losses.terms import TeacherTerm, TokenTerm
from teacher_proto.hardware import runs_triton

BLOCK_ELEMENTS = 2**21
CPU_CHUNK_ELEMENTS = 2**24
GPU_CHUNK_ELEMENTS = 2**27


def default_chunk_rows(vocab_size: int, device: torch.device, heads: int = 1) -> int:
    """Rows per chunk: few enough to limit memory, never so few that the products mostly read the head.

    On a GPU the logits of all `heads` (the student's, and the teacher's where whole vocabularies are compared) take
    512 MiB together, and the gradient half as much in addition. On a CPU each head's logits take 64 MiB.
    """
    elements = GPU_CHUNK_ELEMENTS // heads if device.type == "cuda" else CPU_CHUNK_ELEMENTS
    return max(256, elements // vocab_size)


def run_chunks(
    job: Job, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: tuple[bool, ...]
) -> Outcome:
    """Values, and the gradients with respect to those of (hidden, weight, bias) that `needs` selects, over all rows
    that count for any term.
    """
    head = HeadProjection(weight_VD, bias_V, job.softcap, job.scale, hidden_ND.dtype, job.compute)
    teacher_head = _teacher_projection(job)
    outcome = _empty(job, head, hidden_ND, weight_VD, bias_V, needs)
    # All rows as a slice, or the indices of those that count: finding these waits for the GPU.
    rows_M: Rows = slice(0, len(hidden_ND))
    if not job.every_row:
        rows_M = torch.stack(list(job.counted.values())).any(0).nonzero()[:, 0]
    count = len(hidden_ND) if isinstance(rows_M, slice) else len(rows_M)
    if outcome.weight_VD is not None and not count:
        # It is uninitialised memory until the first chunk writes it, and here there is no chunk.
        outcome.weight_VD.zero_()
    height = min(job.chunk_rows, max(1, count))
    # Logits of one chunk, and the teacher's where whole vocabularies are compared: buffers that all chunks share.
    z_CV = torch.empty(height, len(weight_VD), dtype=head.accumulator, device=hidden_ND.device)
    teacher_CW: Tensor | None = None
    if teacher_head is not None:
        teacher_CW = z_CV.new_empty(height, job.shared, dtype=teacher_head.accumulator)
    between: Between = _Blocks(job, head, teacher_head, outcome)
    if kernels_serve(hidden_ND.device) and _have_kernels(job.terms):
        from student_trainer.losses.fused.launch import FusedTerms  # brings Triton

        between = FusedTerms(job, head, teacher_head, outcome, rows_M, height)
    for start in range(0, count, height):
        chunk = slice(start, min(count, start + height))
        rows_C, z_cV = within(rows_M, chunk), z_CV[: chunk.stop - start]
        teacher_cW = None if teacher_CW is None else teacher_CW[: chunk.stop - start]
        # The student's and the teacher's forward products; then the values and, written over the products, the gradient
        # with respect to them; then the products back to the hidden states and the weight.
        hidden_CD = hidden_ND.detach()[rows_C].to(head.dtype)
        head.project(hidden_CD, z_cV)
        if teacher_head is not None and teacher_cW is not None:
            _project_teacher(job, teacher_head, rows_C, teacher_cW)
        gradient_CV = between.run(start, rows_C, z_cV, teacher_cW)
        if gradient_CV is not None:
            _backward(head, outcome, rows_C, hidden_CD, gradient_CV, begin=start == 0)
    between.finish()
    return outcome


def kernels_serve(device: torch.device) -> bool:
    """Whether Triton kernels compute what lies between the products. Tests force both answers on a CPU."""
    return runs_triton(device)


def _have_kernels(terms: Sequence[TokenTerm]) -> bool:
    """Whether the kernels know every kind among the terms; without a kernel, `_Blocks` computes a kind."""
    from student_trainer.losses.fused.divergences import KINDS, LABEL_KINDS  # bring Triton

    return all(term.kind in (*KINDS, *LABEL_KINDS) for term in terms)


class _Blocks:
    """What lies between the products as torch operations, block by block: the reference."""

    def __init__(self, job: Job, head: HeadProjection, teacher_head: HeadProjection | None, outcome: Outcome):
        self._job, self._head, self._teacher_head, self._outcome = job, head, teacher_head, outcome

    def run(self, start: int, rows_C: Rows, z_CV: Tensor, teacher_CW: Tensor | None) -> Tensor | None:
        if teacher_CW is not None and self._teacher_head is not None:
            self._teacher_head.cap_(teacher_CW)
        for block in _blocks(len(z_CV), z_CV):
            teacher_BW = None if teacher_CW is None else teacher_CW[block]
            _run_block(self._job, self._head, within(rows_C, block), z_CV[block], teacher_BW, self._outcome)
        return z_CV if self._job.wants_grad else None

    def finish(self) -> None:
        """Nothing to do: every block has written its own values."""


def _run_block(
    job: Job, head: HeadProjection, rows_B: Rows, z_BV: Tensor, teacher_BW: Tensor | None, outcome: Outcome
) -> None:
    """From the products in `z_BV`: values into `outcome` and, if wanted, the gradient with respect to them in place."""
    head.cap_(z_BV)
    if job.want_top1:
        outcome.top1_N[rows_B] = z_BV.argmax(-1)
    block = Block(
        labels_N=job.labels_N[rows_B],
        counted={name: counted_N[rows_B] for name, counted_N in job.counted.items()},
        teacher=None if job.teacher is None else job.teacher.select(rows_B),
        teacher_logits_NW=teacher_BW,
        weights_N=None if job.weights_N is None else job.weights_N[rows_B],
    )
    # The next pass and the derivative of a cap need the logits again.
    may_overwrite = len(job.passes) == 1 and head.softcap is None
    gradient_BV: Tensor | None = None
    for run in job.passes:
        values, part_BW = run_pass(run, z_BV, block, job.wants_grad, overwrite=may_overwrite)
        # A pass has only its own terms; the rows of `values_MN` are in the order of the call's terms.
        for index, term in enumerate(job.terms):
            if term.name in values:
                outcome.values_MN[index, rows_B] = values[term.name]
        gradient_BV = _add(gradient_BV, part_BW, z_BV)
    if gradient_BV is not None:
        # So far with respect to the logits; times the derivative of cap and scale, with respect to the products.
        head.uncap_(gradient_BV, z_BV)
        if gradient_BV is not z_BV:
            z_BV.copy_(gradient_BV)


def _add(total_BV: Tensor | None, part_BW: Tensor | None, like_BV: Tensor) -> Tensor | None:
    """total + part; a part may be narrower than the vocabulary."""
    if part_BW is None:
        return total_BV
    if total_BV is None:
        if part_BW.shape == like_BV.shape:
            return part_BW
        total_BV = torch.zeros_like(like_BV)
    total_BV[:, : part_BW.shape[1]] += part_BW
    return total_BV


def _backward(
    head: HeadProjection, outcome: Outcome, rows_C: Rows, hidden_CD: Tensor, gradient_CV: Tensor, *, begin: bool
) -> None:
    # z = h W^T + b: d b = sum of rows of G, d h = G W, d W = G^T h, with G the gradient with respect to z.
    if outcome.bias_V is not None:
        outcome.bias_V.add_(gradient_CV.sum(0, dtype=outcome.bias_V.dtype))
    gradient_CV = gradient_CV.to(head.back_dtype)
    if outcome.hidden_ND is not None:
        outcome.hidden_ND[rows_C] = head.back_to_hidden(gradient_CV).to(outcome.hidden_ND.dtype)
    if outcome.weight_VD is not None:
        head.back_to_weight_(outcome.weight_VD, gradient_CV, hidden_CD.to(head.back_dtype), begin)


def _empty(
    job: Job,
    head: HeadProjection,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    needs: tuple[bool, ...],
) -> Outcome:
    device = hidden_ND.device
    # A row that counts for no term is never computed: its values are 0, its most likely id -1.
    values_MN = torch.zeros(len(job.terms), len(hidden_ND), dtype=head.accumulator, device=device)
    outcome = Outcome(values_MN, torch.full((len(hidden_ND),), -1, dtype=torch.long, device=device))
    if job.wants_grad:
        wide = {"dtype": head.accumulator, "device": device}
        outcome.hidden_ND = torch.zeros_like(hidden_ND) if needs[0] else None
        outcome.weight_VD = torch.empty(weight_VD.shape, **wide) if needs[1] else None  # the first chunk fills it
        outcome.bias_V = torch.zeros(bias_V.shape, **wide) if needs[2] and bias_V is not None else None
    return outcome


def _blocks(height: int, z_CV: Tensor) -> Iterator[slice]:
    # A few rows at a time on a CPU: their logits stay in cache between one sweep and the next.
    step = max(1, BLOCK_ELEMENTS // z_CV.shape[1])
    for start in range(0, height, step):
        yield slice(start, min(height, start + step))


def _teacher_projection(job: Job) -> HeadProjection | None:
    """The teacher's head, cut to the shared vocabulary, if any term compares whole vocabularies."""
    if not any(_compares_vocabularies(term) for term in job.terms):
        return None
    assert job.teacher is not None
    head, hidden_NE = job.teacher.teacher_head, job.teacher.teacher_hidden_NE
    assert head is not None and hidden_NE is not None
    bias_W = None if head.bias_V is None else head.bias_V[: job.shared]
    return HeadProjection(head.weight_VD[: job.shared], bias_W, head.softcap, head.scale, hidden_NE.dtype, job.compute)


def _compares_vocabularies(term: TokenTerm) -> bool:
    return isinstance(term, TeacherTerm) and SUPPORTS[term.support].student == "vocabulary"


def _project_teacher(job: Job, head: HeadProjection, rows_C: Rows, out_CW: Tensor) -> None:
    assert job.teacher is not None and job.teacher.teacher_hidden_NE is not None
    hidden_CE = job.teacher.teacher_hidden_NE[rows_C].to(head.dtype)
    # Rows without a teacher may hold anything, and NaN times a weight of zero is NaN.
    counted_N = next(job.counted[term.name] for term in job.terms if _compares_vocabularies(term))
    hidden_CE = torch.where(counted_N[rows_C][:, None], hidden_CE, 0.0)
    head.project(hidden_CE, out_CW)
