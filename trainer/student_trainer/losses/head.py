"""Every loss from one operation over hidden states: head, losses and their gradient together, chunk by chunk.

Called by the students (through the loop) and by evaluation. `head_loss` never holds an array of [rows, vocabulary]
beyond a chunk of rows: the gradient is made in the forward pass, while a chunk's logits are at hand, and the backward
pass only scales it. That costs the three matrix products of plain cross-entropy and no recomputation.

    checks    what a call must satisfy                         plan        the call, and what comes of it
    chunks    a call's rows, chunk by chunk                   projection  the matrix products
    passes    the algebra of a block of rows           supports    the teacher's side of it
    divergences    the formula of each kind
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.checks import (
    check_labels,
    check_shapes,
    check_targets,
    raise_failed,
    rows_that_count,
    shared_width,
)
from student_trainer.losses.chunks import default_chunk_rows, run_chunks
from student_trainer.losses.plan import Job, is_dense, plan_passes
from student_trainer.losses.terms import TokenTerm
from student_trainer.losses.values import HeadLoss


def head_loss(
    hidden_ND: Tensor, head_weight_VD: Tensor, labels_N: Tensor, teacher: TeacherRows | None,
    terms: Sequence[TokenTerm], *,
    head_bias_V: Tensor | None = None, logit_softcap: float | None = None, logit_scale: float = 1.0,
    shared_vocab: int | None = None, weights_N: Tensor | None = None, chunk_rows: int | None = None,
    want_top1: bool = False, compute: torch.dtype = torch.float32, every_row: bool = False, defer: bool = False,
) -> HeadLoss:  # fmt: skip
    """The sum of all terms over N rows, with its gradient.

    `labels_N`: the token that row n predicts; -100 leaves the row out of cross-entropy. Distillation terms count the
    rows where `teacher.valid_N` is True, or, without `valid_N`, those with a label.
    The student's logits are cap(logit_scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap).
    `shared_vocab`: how many leading ids student and teacher have in common (default: all of the student's); `supports`
    says what becomes of the others.
    `weights_N`: what the values of each row, and with them its gradient, are multiplied by in `total`; None: by 1.
    `chunk_rows`: rows whose logits exist at a time; the default keeps a chunk near 64 MiB on a CPU, 512 MiB on a GPU.
    Values and gradients do not depend on it beyond rounding. Under `torch.no_grad()` no gradient is made.
    `compute`: the dtype that the student computes in; at bfloat16 the products take bf16 factors, as `projection` says.
    `every_row`: whether all rows count for some term, as the caller knows; else the device is asked which do.
    `defer`: leave the checks that look into tensors, in `deferred`, to the caller. With both, no device is waited for.
    `total` can be differentiated once: its backward pass consumes the gradient that was made here.
    Raises ValueError where shapes disagree, a name comes twice, a term needs targets that `teacher` has not, or the
    teacher names ids that the student has not and `shared_vocab` was not given.
    """
    vocab_size = len(head_weight_VD)
    check_shapes(hidden_ND, head_weight_VD, labels_N, terms, weights_N)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"got chunk_rows {chunk_rows}, expected 1 or more")
    shared = shared_width(shared_vocab, vocab_size)
    counted = {term.name: rows_that_count(term, labels_N, teacher) for term in terms}
    checks = list(check_labels(labels_N, vocab_size))
    for term in terms:
        checks += check_targets(term, teacher, counted[term.name], vocab_size if shared_vocab is None else None)
    if not defer:
        raise_failed(checks)
    passes = plan_passes(terms, vocab_size, shared)
    heads = 2 if any(is_dense(each.support) for each in passes) else 1
    leaves = (hidden_ND, head_weight_VD, head_bias_V)
    job = Job(
        labels_N=labels_N, teacher=teacher, terms=tuple(terms), passes=passes, counted=counted, shared=shared,
        softcap=logit_softcap, scale=logit_scale, want_top1=want_top1, compute=compute, every_row=every_row,
        weights_N=weights_N, chunk_rows=chunk_rows or default_chunk_rows(vocab_size, hidden_ND.device, heads),
        wants_grad=torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves),
    )  # fmt: skip
    total, values_MN, top1_N = _HeadLoss.apply(*leaves, job)
    per_term = {term.name: values_MN[index] for index, term in enumerate(terms)}
    return HeadLoss(total, per_term, counted, top1_N if want_top1 else None, tuple(checks) if defer else ())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: Job) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            outcome = run_chunks(job, hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[:3])
            values_MN = outcome.values_MN
            # total = sum over terms m and rows n of coefficient_m weight_n value_mn; the kernels and `passes` have put
            # the same factors into the gradient.
            coefficients_M = torch.tensor([term.coefficient for term in job.terms], dtype=values_MN.dtype)
            coefficients_M = coefficients_M.to(values_MN.device, non_blocking=True)
            sums_M = values_MN.sum(1) if job.weights_N is None else values_MN @ job.weights_N.to(values_MN.dtype)
            total = coefficients_M @ sums_M
        weight_grad, bias_grad = outcome.weight_VD, outcome.bias_V
        # Kept in the context by hand: saved tensors may not be written over, and the backward pass does.
        ctx.gradients = (
            outcome.hidden_ND,
            None if weight_grad is None else weight_grad.to(weight_VD.dtype),
            None if bias_grad is None or bias_V is None else bias_grad.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(outcome.values_MN, outcome.top1_N)
        return total, outcome.values_MN, outcome.top1_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss was differentiated before: call head_loss again instead of retaining the graph"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # d total' / d x = grad_total * d total / d x: `grad_total` is 1 / count of the batch's tokens, a scalar.
        return *(None if gradient is None else gradient.mul_(grad_total) for gradient in gradients), None
