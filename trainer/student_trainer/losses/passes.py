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


@dataclass
class _Push:
    """A pass's gradient by its tempered logits, in parts: everywhere, outside the support, at the support's ids."""

    spread_N: Tensor
    tail_N: Tensor
    at_NK: Tensor | None = None


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


def run_pass(job: Pass, z_NV: Tensor, block: Block, wants_grad: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Values [N] by term name, in nats, 0 on rows that do not count; and the weighted gradient [N, width] by z."""
    run = _dense_pass if job.support == "full" else _sparse_pass
    return run(job, z_NV[:, : job.width], block, wants_grad)


def _sparse_pass(job: Pass, z_NW: Tensor, block: Block, wants_grad: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    q_NW, lse_N = _softmax(z_NW, job.temperature)
    values: dict[str, Tensor] = {}
    push = _Push(torch.zeros_like(lse_N), torch.zeros_like(lse_N))
    label_N1 = block.labels_N.clamp_min(0)[:, None]
    at_label_N = torch.zeros_like(lse_N)
    for term in job.label_terms:
        value_N, slope_N = cross_entropy(z_NW.gather(1, label_N1)[:, 0] - lse_N)
        weight_N = _weight(term, block.counted[term.name], lse_N)
        values[term.name] = value_N * block.counted[term.name]
        push.spread_N -= weight_N * slope_N
        at_label_N += weight_N * slope_N
    support = _read(job, block) if job.terms else None
    if support is None:
        gradient_NW = q_NW.mul_(push.spread_N[:, None]) if wants_grad else None
    else:
        gradient_NW = _on_support(job, z_NW, q_NW, lse_N, support, block, values, push, wants_grad)
    if gradient_NW is not None and job.label_terms:
        gradient_NW.scatter_add_(1, label_N1, at_label_N[:, None])
    if gradient_NW is not None and job.temperature != 1.0:
        gradient_NW.div_(job.temperature)
    return values, gradient_NW


def _on_support(
    job: Pass,
    z_NW: Tensor,
    q_NW: Tensor,
    lse_N: Tensor,
    support: SupportRows,
    block: Block,
    values: dict[str, Tensor],
    push: _Push,
    wants_grad: bool,
) -> Tensor | None:
    """The terms on one support: fills in `values`, and turns `q_NW` into the gradient in place."""
    ids_NK, live_NK = support.ids_NK, support.live_NK
    log_q_NK = torch.where(live_NK, z_NW.gather(1, ids_NK) / job.temperature - lse_N[:, None], LOG_FLOOR)
    # A row without a live id has its hole at id 0, which belongs to the tail there.
    bare_N = ~live_NK.any(-1)
    bare_q_N = torch.where(bare_N, q_NW[:, 0], 0.0)
    q_NW.scatter_(1, ids_NK, 0.0)
    tail_q_N = (q_NW.sum(-1) + bare_q_N).clamp_min(torch.finfo(torch.float32).tiny)
    push.at_NK = torch.zeros_like(log_q_NK)
    for term in job.terms:
        values[term.name] = _one_term(term, job.width, log_q_NK, tail_q_N, support, block.counted[term.name], push)
    if not wants_grad:
        return None
    outside_N = push.spread_N + push.tail_N
    at_NK = torch.where(live_NK, log_q_NK.exp() * push.spread_N[:, None] + push.at_NK, 0.0)
    gradient_NW = q_NW.mul_(outside_N[:, None])
    gradient_NW.scatter_add_(1, ids_NK, at_NK)
    gradient_NW[:, 0] += bare_q_N * outside_N
    return gradient_NW


def _one_term(
    term: Term, width: int, log_q_NK: Tensor, tail_q_N: Tensor, support: SupportRows, counted_N: Tensor, push: _Push
) -> Tensor:
    """The term's values [N]; its gradient is added to `push`."""
    assert push.at_NK is not None
    weight_N = _weight(term, counted_N, tail_q_N)
    if term.support == "sampled":
        log_p_NB, log_q_NB = support.logprobs_NK, log_q_NK
    elif term.tail == "renormalise":
        log_p_NB, log_q_NB = (renormalised(x, support.live_NK) for x in (support.logprobs_NK, log_q_NK))
    else:
        log_p_NB, log_q_NB = with_tail(support, width), torch.cat([log_q_NK, tail_q_N.log()[:, None]], 1)
    value_N, slope_NB = DIVERGENCES[term.kind](log_p_NB, log_q_NB, term)
    total_N = slope_NB.sum(-1)
    if term.support != "sampled" and term.tail == "renormalise":
        push.at_NK += weight_N[:, None] * (slope_NB - log_q_NB.exp() * total_N[:, None])
        counted_N = counted_N & support.live_NK.any(-1)
    else:
        push.spread_N -= weight_N * total_N
        push.at_NK += weight_N[:, None] * slope_NB[:, : log_q_NK.shape[1]]
        if slope_NB.shape[1] > log_q_NK.shape[1]:
            push.tail_N += weight_N * slope_NB[:, -1] / tail_q_N
    return torch.where(counted_N, value_N * term.squared, 0.0)


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
            slope_NW.sub_(log_q_NW.exp().mul_(slope_NW.sum(-1, keepdim=True))).mul_(weight_N[:, None])
            gradient_NW = slope_NW if gradient_NW is None else gradient_NW.add_(slope_NW)
    return values, gradient_NW


def _weight(term: Term, counted_N: Tensor, like: Tensor) -> Tensor:
    """What the term's value counts in the total, row by row."""
    return counted_N.to(like.dtype) * (term.coefficient * term.squared)


def _read(job: Pass, block: Block) -> SupportRows:
    assert block.teacher is not None and job.support is not None
    counted_N = torch.stack([block.counted[term.name] for term in job.terms]).any(0)
    return read_support(block.teacher, job.support, job.temperature, job.width, counted_N)


def _softmax(z_NW: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(softmax(z / T), lse(z / T)). The largest entry gives the lse: torch.logsumexp costs a second pass of exp."""
    q_NW = torch.softmax(z_NW if temperature == 1.0 else z_NW / temperature, -1)
    return q_NW, z_NW.amax(-1) / temperature - q_NW.amax(-1).log()
