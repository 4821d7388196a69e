"""The algebra of a block of rows: logits in, values of every term and the gradient by the logits out. Called by `head`.

A pass is one softmax of the logits at one temperature, shared by all terms that need it. Let b run over the buckets of
a divergence (K ids, and perhaps the tail), and g_b = d value / d log q_b. With log q_b = lse_b(z/T) - lse(z/T),

    d value / d z_j = (1/T) (g_b(j) q_j / q_b(j) - q_j sum_b g_b),

so outside the support the gradient is one number a row times the softmax, and inside it is K numbers a row: no second
array of the vocabulary's width is needed. The student's tail mass is summed over the tail itself, with the K entries
taken out, and so are the K entries of the gradient: one minus the sum would lose all digits of a small tail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.cross_entropy import cross_entropy
from student_trainer.losses.jsd import jsd
from student_trainer.losses.kl import forward_kl, reverse_kl
from student_trainer.losses.rows import TeacherRows
from student_trainer.losses.sampled import sampled_cross_entropy
from student_trainer.losses.skewed_kl import skewed_kl, skewed_reverse_kl
from student_trainer.losses.supports import LOG_FLOOR, SupportRows, read_support, renormalised, with_tail
from student_trainer.losses.terms import Term
from student_trainer.losses.tvd import tvd

DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Term], tuple[Tensor, Tensor]]] = {
    "top_k_kl": forward_kl,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "tvd": tvd,
    "sampled": sampled_cross_entropy,
}


@dataclass(frozen=True)
class Pass:
    """Terms that share one softmax over the first `width` logits at `temperature`, and one support."""

    temperature: float
    width: int
    support: str | None
    terms: tuple[Term, ...]
    label_terms: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Block:
    """What a block of rows brings along: labels, teacher rows, the teacher's logits for "full", who counts for what."""

    labels_N: Tensor
    counted: Mapping[str, Tensor]
    teacher: TeacherRows | None = None
    teacher_logits_NW: Tensor | None = None


@dataclass(frozen=True)
class _Student:
    """The student at a pass's temperature. `q_NW` loses its entries at the support's ids, see `_support_terms`."""

    z_NW: Tensor
    q_NW: Tensor
    lse_N: Tensor
    temperature: float

    def logprobs(self, ids_NK: Tensor) -> Tensor:
        return self.z_NW.gather(1, ids_NK) / self.temperature - self.lse_N[:, None]


@dataclass
class _Push:
    """A pass's gradient by z / T in parts: everywhere and outside the support (both times q), at its ids, at the label.

    `bare_q_N`: see `_support_terms`.
    """

    spread_N: Tensor
    tail_N: Tensor
    at_label_N: Tensor
    ids_NK: Tensor | None = None
    at_NK: Tensor | None = None
    bare_q_N: Tensor | None = None


def plan_passes(terms: Sequence[Term], vocab_size: int, shared_vocab: int) -> tuple[Pass, ...]:
    """As few passes as the terms allow; cross-entropy rides along where a pass has its softmax anyway."""
    groups: dict[tuple[float, int, str | None], list[Term]] = {}
    for term in terms:
        if term.kind != "cross_entropy":
            groups.setdefault((term.temperature, shared_vocab, term.support), []).append(term)
    labels = tuple(term for term in terms if term.kind == "cross_entropy")
    host = next((key for key in groups if key[:2] == (1.0, vocab_size) and key[2] != "full"), None)
    if labels and host is None:
        host = (1.0, vocab_size, None)
        groups[host] = []
    return tuple(
        Pass(*key, terms=tuple(members), label_terms=labels if key == host else ()) for key, members in groups.items()
    )


def run_pass(
    job: Pass, z_NV: Tensor, block: Block, wants_grad: bool, out_NV: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Values [N] by term name, in nats, 0 on rows that do not count; and the weighted gradient [N, width] by z.

    The gradient is written into `out_NV` where that is given and the pass is as wide; it may be `z_NV` itself.
    """
    z_NW = z_NV[:, : job.width]
    if job.support == "full":
        return _dense_pass(job, z_NW, block, wants_grad)
    student = _soften(z_NW, job.temperature)
    nothing_N = torch.zeros_like(student.lse_N)
    push = _Push(nothing_N, nothing_N.clone(), nothing_N.clone())
    values = _label_terms(job, student, block, push)
    if job.terms:
        values |= _support_terms(job, student, block, push)
    if not wants_grad:
        return values, None
    return values, _assemble(job, student, block, push, out_NV if z_NW.shape == z_NV.shape else None)


def _label_terms(job: Pass, student: _Student, block: Block, push: _Push) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for term in job.label_terms:
        counted_N = block.counted[term.name]
        weight_N = _weight(term, counted_N, student.lse_N)
        value_N, slope_N = cross_entropy(student.logprobs(block.labels_N.clamp_min(0)[:, None])[:, 0])
        values[term.name] = torch.where(counted_N, value_N, 0.0)
        push.spread_N -= weight_N * slope_N
        push.at_label_N += weight_N * slope_N
    return values


def _support_terms(job: Pass, student: _Student, block: Block, push: _Push) -> dict[str, Tensor]:
    """The terms on the pass's support. Leaves zeros in `student.q_NW` at the support's ids.

    A row without a live id has its zero at id 0, which there belongs to the tail: `push.bare_q_N` remembers it.
    """
    assert block.teacher is not None and job.support is not None
    counted_N = torch.stack([block.counted[term.name] for term in job.terms]).any(0)
    support = read_support(block.teacher, job.support, job.temperature, job.width, counted_N)
    log_q_NK = torch.where(support.live_NK, student.logprobs(support.ids_NK), LOG_FLOOR)
    bare_q_N = torch.where(support.live_NK.any(-1), 0.0, student.q_NW[:, 0])
    student.q_NW.scatter_(1, support.ids_NK, 0.0)
    tail_q_N = (student.q_NW.sum(-1) + bare_q_N).clamp_min(torch.finfo(torch.float32).tiny)
    at_NK = torch.zeros_like(log_q_NK)
    values: dict[str, Tensor] = {}
    for term in job.terms:
        counted_N = block.counted[term.name]
        weight_N = _weight(term, counted_N, tail_q_N)
        if term.support != "sampled" and term.tail == "renormalise":
            value_N, slope_NK = _given_support(term, support, log_q_NK)
        else:
            value_N, total_N, slope_NK, slope_tail_N = _with_the_rest(term, support, log_q_NK, tail_q_N, job.width)
            push.spread_N -= weight_N * total_N
            push.tail_N += weight_N * slope_tail_N / tail_q_N
        at_NK += weight_N[:, None] * slope_NK
        values[term.name] = torch.where(counted_N, value_N * term.squared, 0.0)
    push.ids_NK, push.bare_q_N = support.ids_NK, bare_q_N
    push.at_NK = torch.where(support.live_NK, at_NK + log_q_NK.exp() * push.spread_N[:, None], 0.0)
    return values


def _given_support(term: Term, support: SupportRows, log_q_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(value_N, gradient_NK) of a divergence between the two distributions given that the token is in the support."""
    log_p_NK, log_q_NK = (renormalised(x, support.live_NK) for x in (support.logprobs_NK, log_q_NK))
    value_N, slope_NK = DIVERGENCES[term.kind](log_p_NK, log_q_NK, term)
    gradient_NK = slope_NK - log_q_NK.exp() * slope_NK.sum(-1, keepdim=True)
    return torch.where(support.live_NK.any(-1), value_N, 0.0), gradient_NK


def _with_the_rest(
    term: Term, support: SupportRows, log_q_NK: Tensor, tail_q_N: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value, sum of slopes, slopes at the ids, slope of the tail) of a divergence over the whole vocabulary's mass."""
    if term.support == "sampled":
        value_N, slope_NK = DIVERGENCES[term.kind](support.logprobs_NK, log_q_NK, term)
        return value_N, slope_NK.sum(-1), slope_NK, torch.zeros_like(value_N)
    log_q_NB = torch.cat([log_q_NK, tail_q_N.log()[:, None]], 1)
    value_N, slope_NB = DIVERGENCES[term.kind](with_tail(support, width), log_q_NB, term)
    return value_N, slope_NB.sum(-1), slope_NB[:, :-1], slope_NB[:, -1]


def _assemble(job: Pass, student: _Student, block: Block, push: _Push, out_NW: Tensor | None) -> Tensor:
    """The gradient by z. All that is as wide as the vocabulary happens in one product."""
    outside_N = (push.spread_N + push.tail_N) / job.temperature
    gradient_NW = torch.mul(student.q_NW, outside_N[:, None], out=student.q_NW if out_NW is None else out_NW)
    if push.ids_NK is not None and push.at_NK is not None and push.bare_q_N is not None:
        gradient_NW.scatter_add_(1, push.ids_NK, push.at_NK / job.temperature)
        gradient_NW[:, 0] += push.bare_q_N * outside_N
    if job.label_terms:
        gradient_NW.scatter_add_(1, block.labels_N.clamp_min(0)[:, None], push.at_label_N[:, None])
    return gradient_NW


def _dense_pass(job: Pass, z_NW: Tensor, block: Block, wants_grad: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Divergences over the whole shared vocabulary: every id is a bucket of its own."""
    assert block.teacher_logits_NW is not None
    log_p_NW = torch.log_softmax(block.teacher_logits_NW / job.temperature, -1)
    log_q_NW = torch.log_softmax(z_NW / job.temperature, -1)
    values: dict[str, Tensor] = {}
    gradient_NW: Tensor | None = None
    for term in job.terms:
        counted_N = block.counted[term.name]
        value_N, slope_NW = DIVERGENCES[term.kind](log_p_NW, log_q_NW, term)
        values[term.name] = torch.where(counted_N, value_N * term.squared, 0.0)
        if wants_grad:
            weight_N = _weight(term, counted_N, log_q_NW) / job.temperature
            part_NW = slope_NW.sub_(log_q_NW.exp().mul_(slope_NW.sum(-1, keepdim=True))).mul_(weight_N[:, None])
            gradient_NW = part_NW if gradient_NW is None else gradient_NW.add_(part_NW)
    return values, gradient_NW


def _weight(term: Term, counted_N: Tensor, like: Tensor) -> Tensor:
    """What the term's value counts in the total, row by row."""
    return counted_N.to(like.dtype) * (term.coefficient * term.squared)


def _soften(z_NW: Tensor, temperature: float) -> _Student:
    """softmax(z / T) and lse(z / T). The largest entry gives the lse: torch.logsumexp costs a second pass of exp."""
    q_NW = torch.softmax(z_NW if temperature == 1.0 else z_NW / temperature, -1)
    return _Student(z_NW, q_NW, z_NW.amax(-1) / temperature - q_NW.amax(-1).log(), temperature)
