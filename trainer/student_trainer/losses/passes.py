"""The losses of a block of rows: logits in, the values of every term and the gradient with respect to the logits out.
Called by `chunks`.

A pass is one softmax of the logits at one temperature, shared by all terms that need it. Let b run over the buckets of
a divergence (K ids, and perhaps the tail), and g_b = d value / d log q_b. With log q_b = lse_b(z/T) - lse(z/T),

    d value / d z_j = (1/T) (g_b(j) q_j / q_b(j) - q_j sum_b g_b),

where b(j) is the bucket of id j. So outside the support the gradient is the softmax times one number per row, and
inside it is K numbers per row: no second array as wide as the vocabulary is needed. The K logits are taken out before
the sweeps, so that the student's tail is summed on its own: one minus the sum over the K ids would lose all digits of a
small tail.

Only two sweeps of torch operations, one in and one out, touch an array as wide as the vocabulary; between them
everything is a few numbers per row. The first sweep keeps the softmax for the second, since on a CPU computing exp
again costs more than the memory does. The GPU kernels compute it again, see `fused`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.divergences import DIVERGENCES, LABEL_LOSSES
from student_trainer.losses.plan import Pass, is_dense
from student_trainer.losses.supports import LOG_FLOOR, SupportRows, read_support, renormalised, with_tail
from student_trainer.losses.terms import TeacherTerm, TokenTerm

# Replaces the logit of an id that is taken out: its exponential vanishes and, unlike -inf, a row may consist of it.
HOLE = -1e20


@dataclass(frozen=True)
class Block:
    """What goes with a block of rows: labels, teacher rows, the teacher's logits for support "full", which rows count
    for which term, and the weight of each row in the total (None: 1).
    """

    labels_N: Tensor
    counted: Mapping[str, Tensor]
    teacher: TeacherRows | None = None
    teacher_logits_NW: Tensor | None = None
    weights_N: Tensor | None = None


@dataclass(frozen=True)
class _Student:
    """The student at a pass's temperature: logprobs of the support's ids, and of all the rest together."""

    support: SupportRows
    log_q_NK: Tensor
    log_tail_N: Tensor


@dataclass
class _GradientParts:
    """A pass's gradient with respect to z / T, in parts: everywhere (times q), on the tail (times q within the tail),
    at ids, at the label.

    A term whose slope on the tail's bucket is g adds g to `tail_N`; see the module's formula.
    """

    spread_N: Tensor
    tail_N: Tensor
    at_label_N: Tensor
    at_NK: Tensor | None = None


def run_pass(
    job: Pass, z_NV: Tensor, block: Block, wants_grad: bool, *, overwrite: bool = False
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Values [N] by term name, in nats, 0 on rows that do not count; and the weighted gradient [N, width] by z.

    With `overwrite`, if the pass is as wide as `z_NV`, the gradient is written over `z_NV`; otherwise `z_NV` holds the
    same logits after the pass as before.
    """
    z_NW = z_NV[:, : job.width]  # a view: writing to it writes to `z_NV`
    if is_dense(job.support):
        return _dense_pass(job, z_NW, block, wants_grad)
    overwrite = overwrite and wants_grad and z_NW.shape == z_NV.shape
    # From the whole vocabulary: in a pass without label terms, the label may lie beyond the pass's ids.
    label_N1 = block.labels_N.clamp(0, z_NV.shape[1] - 1)[:, None]
    z_label_N = z_NV.gather(1, label_N1)[:, 0]
    support, z_NK = _take_out(job, z_NW, block)
    swept = sweep_in(z_NW, job.temperature)
    # Each term adds its parts; the gradient with respect to all logits is computed once, from the sums.
    nothing_N = torch.zeros_like(swept.lse_N)
    parts = _GradientParts(nothing_N, nothing_N.clone(), nothing_N.clone())
    lse_N, student = _normalise(job, swept.lse_N, support, z_NK)
    values = _label_terms(job, z_label_N - lse_N, block, parts)
    if student is not None:
        values |= _support_terms(job, student, block, parts)
    gradient_NW = None
    if wants_grad:
        # Outside the support: q_j spread + (q_j / q_tail) tail. The sweep's softmax is of the rest alone, that is
        # q_j / q_tail, so one number per row multiplies it. 1 / T, since softmaxes are of z / T.
        row_N = parts.spread_N if student is None else parts.spread_N * student.log_tail_N.exp() + parts.tail_N
        gradient_NW = sweep_out(swept, z_NW, row_N / job.temperature, overwrite=overwrite)
        # The ids were taken out of the sweep, which leaves exp(HOLE) = 0 there. The label may be one of them.
        if student is not None and parts.at_NK is not None:
            gradient_NW.scatter_add_(1, student.support.ids_NK, parts.at_NK / job.temperature)
        if job.label_terms:  # at T = 1
            gradient_NW.scatter_add_(1, label_N1, parts.at_label_N[:, None])
    if support is not None and z_NK is not None and not overwrite:
        z_NW.scatter_(1, support.ids_NK, z_NK)
    return values, gradient_NW


def _take_out(job: Pass, z_NW: Tensor, block: Block) -> tuple[SupportRows | None, Tensor | None]:
    """The teacher's support and the student's logits on it, which become HOLEs in `z_NW`, except on rows without a live
    id.
    """
    if not job.terms:
        return None, None
    assert block.teacher is not None and job.support is not None
    counted_N = torch.stack([block.counted[term.name] for term in job.terms]).any(0)
    support = read_support(block.teacher, job.support, job.temperature, job.width, counted_N)
    z_NK = z_NW.gather(1, support.ids_NK)
    z_NW.scatter_(1, support.ids_NK, torch.where(support.live_NK.any(-1, keepdim=True), HOLE, z_NK))
    return support, z_NK


def _normalise(
    job: Pass, rest_N: Tensor, support: SupportRows | None, z_NK: Tensor | None
) -> tuple[Tensor, _Student | None]:
    """lse(z / T) over all ids, from that of the rest and the logits taken out; and the student normalised by it."""
    if support is None or z_NK is None:
        return rest_N, None
    # log(exp(lse of the rest) + sum over k of exp(z_k / T)), over the K logits without padding.
    z_NK = torch.where(support.live_NK, z_NK / job.temperature, HOLE)
    lse_N = torch.logaddexp(rest_N, z_NK.logsumexp(-1))
    log_q_NK = torch.where(support.live_NK, z_NK - lse_N[:, None], LOG_FLOOR)
    return lse_N, _Student(support, log_q_NK, rest_N - lse_N)


def _label_terms(job: Pass, log_q_label_N: Tensor, block: Block, parts: _GradientParts) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for term in job.label_terms:
        counted_N = block.counted[term.name]
        weight_N = _weight(term, block, log_q_label_N)
        # One bucket, g = d value / d log q(label): d value / d z_j = g ([j = label] - q_j).
        value_N, slope_N = LABEL_LOSSES[term.kind](log_q_label_N, term.settings)
        values[term.name] = torch.where(counted_N, value_N, 0.0)
        parts.spread_N -= weight_N * slope_N
        parts.at_label_N += weight_N * slope_N
    return values


def _support_terms(job: Pass, student: _Student, block: Block, parts: _GradientParts) -> dict[str, Tensor]:
    live_NK = student.support.live_NK
    at_NK = torch.zeros_like(student.log_q_NK)
    values: dict[str, Tensor] = {}
    for term in job.terms:
        counted_N = block.counted[term.name]
        weight_N = _weight(term, block, at_NK)
        if term.renormalises:
            value_N, slope_NK = _given_support(term, student)
        else:
            # Everywhere -q_j sum_b g_b; on the tail's ids also g_tail q_j / q_tail; at an id, its own g.
            value_N, total_N, slope_NK, slope_tail_N = _with_the_rest(term, student, job.width)
            parts.spread_N -= weight_N * total_N
            parts.tail_N += weight_N * slope_tail_N
        at_NK += weight_N[:, None] * slope_NK
        values[term.name] = torch.where(counted_N, value_N * term.squared, 0.0)
    # The sweep gives nothing to ids that were taken out of it, so their share of the spread part is added here.
    parts.at_NK = torch.where(live_NK, at_NK + student.log_q_NK.exp() * parts.spread_N[:, None], 0.0)
    return values


def _given_support(term: TeacherTerm, student: _Student) -> tuple[Tensor, Tensor]:
    """(value_N, gradient_NK) of a divergence between the two distributions, each renormalised over the support."""
    live_NK = student.support.live_NK
    log_p_NK, log_q_NK = (renormalised(x, live_NK) for x in (student.support.logprobs_NK, student.log_q_NK))
    value_N, slope_NK = DIVERGENCES[term.kind](log_p_NK, log_q_NK, term.settings)
    # q' = q / sum q over the support is a softmax of its K logits alone: d value / d z_k = g_k - q'_k sum g.
    gradient_NK = slope_NK - log_q_NK.exp() * slope_NK.sum(-1, keepdim=True)
    return value_N, gradient_NK


def _with_the_rest(term: TeacherTerm, student: _Student, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value, sum of slopes, slopes at the ids, slope of the tail), with q normalised over the whole vocabulary."""
    if term.plain:  # a weighted sum over the ids' logprobs, without a bucket for the rest
        value_N, slope_NK = DIVERGENCES[term.kind](student.support.logprobs_NK, student.log_q_NK, term.settings)
        return value_N, slope_NK.sum(-1), slope_NK, torch.zeros_like(value_N)
    log_q_NB = torch.cat([student.log_q_NK, student.log_tail_N[:, None]], 1)
    value_N, slope_NB = DIVERGENCES[term.kind](with_tail(student.support, width), log_q_NB, term.settings)
    return value_N, slope_NB.sum(-1), slope_NB[:, :-1], slope_NB[:, -1]


def _dense_pass(job: Pass, z_NW: Tensor, block: Block, wants_grad: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Divergences over the whole shared vocabulary: every id is a bucket of its own."""
    assert block.teacher_logits_NW is not None
    log_p_NW = torch.log_softmax(block.teacher_logits_NW / job.temperature, -1)
    log_q_NW = torch.log_softmax(z_NW / job.temperature, -1)
    values: dict[str, Tensor] = {}
    gradient_NW: Tensor | None = None
    for term in job.terms:
        counted_N = block.counted[term.name]
        value_N, slope_NW = DIVERGENCES[term.kind](log_p_NW, log_q_NW, term.settings)
        values[term.name] = torch.where(counted_N, value_N * term.squared, 0.0)
        if wants_grad:
            # w / T (g_j - q_j sum g), in place: in the memory of the slopes and of q.
            weight_N = _weight(term, block, log_q_NW) / job.temperature
            part_NW = slope_NW.sub_(log_q_NW.exp().mul_(slope_NW.sum(-1, keepdim=True))).mul_(weight_N[:, None])
            gradient_NW = part_NW if gradient_NW is None else gradient_NW.add_(part_NW)
    return values, gradient_NW


def _weight(term: TokenTerm, block: Block, like: Tensor) -> Tensor:
    """What the term's value is multiplied by in the total, per row; 0 on rows that do not count."""
    weight_N = block.counted[term.name].to(like.dtype) * (term.coefficient * term.squared)
    return weight_N if block.weights_N is None else weight_N * block.weights_N.to(like.dtype)


@dataclass(frozen=True)
class Swept:
    """lse(z / T) of each row, and its softmax."""

    lse_N: Tensor
    q_NW: Tensor


def sweep_in(z_NW: Tensor, temperature: float) -> Swept:
    """lse(z / T) and softmax(z / T)."""
    # No division at T = 1, since it would copy the whole array.
    q_NW = torch.softmax(z_NW if temperature == 1.0 else z_NW / temperature, -1)
    # max q = exp(max z / T - lse): the largest entry gives the lse; torch.logsumexp would compute all of exp again.
    return Swept(z_NW.amax(-1) / temperature - q_NW.amax(-1).log(), q_NW)


def sweep_out(swept: Swept, z_NW: Tensor, row_N: Tensor, *, overwrite: bool) -> Tensor:
    """softmax(z / T) times one number per row; written over `z_NW` with `overwrite`, else over the softmax."""
    return torch.mul(swept.q_NW, row_N[:, None], out=z_NW if overwrite else swept.q_NW)
