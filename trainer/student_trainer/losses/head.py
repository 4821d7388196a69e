"""All token losses as one operation on hidden states: head, losses and their gradient together, chunk by chunk.

Called by the students (through the loop) and by evaluation. `head_loss` holds an array of [rows, vocabulary] for one
chunk of rows only: the gradient is computed in the forward pass, while a chunk's logits exist, and the backward pass
only scales it. That costs the three matrix products of plain cross-entropy, without recomputation.

    checks    checks on the arguments                 plan         the call and its outcome
    chunks    a call's rows, chunk by chunk           projection   the matrix products
    passes    the losses of a block of rows           supports     the teacher's side of them
                                                      divergences  the formula of each kind
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
    rows where `teacher.valid_N` is True or, without `valid_N`, those with a label.
    The student's logits are cap(logit_scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap).
    `shared_vocab`: how many leading ids student and teacher have in common (default: all of the student's); `supports`
    says how the others are treated.
    `weights_N`: multiplies each row's values, and so its gradient, in `total`; None: all 1.
    `chunk_rows`: rows whose logits exist at a time; by default about 64 MiB of them on a CPU, 512 MiB on a GPU. Values
    and gradients do not depend on it, except by rounding. Under `torch.no_grad()` no gradient is computed.
    `compute`: the dtype that the student computes in; with bfloat16 the products take bf16 factors, see `projection`.
    `every_row`: True if the caller knows that every row counts for some term; otherwise the device is asked which do.
    `defer`: leave the checks that read tensors to the caller, in `deferred`. With both, no device is waited for.
    `total` can be differentiated once: its backward pass consumes the gradient computed here.
    Raises ValueError if shapes disagree, a name occurs twice, a term needs targets that `teacher` lacks, or the
    teacher's ids are beyond the student's vocabulary and `shared_vocab` was not given.
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
            # total = sum over terms m and rows n of coefficient_m weight_n value_mn; the kernels and `passes` have
            # applied the same factors to the gradient.
            coefficients_M = torch.tensor([term.coefficient for term in job.terms], dtype=values_MN.dtype)
            coefficients_M = coefficients_M.to(values_MN.device, non_blocking=True)
            sums_M = values_MN.sum(1) if job.weights_N is None else values_MN @ job.weights_N.to(values_MN.dtype)
            total = coefficients_M @ sums_M
        weight_grad, bias_grad = outcome.weight_VD, outcome.bias_V
        # Set on the context directly: tensors saved by autograd may not be modified, and the backward pass does that.
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
                "this loss was already differentiated: call head_loss again instead of retaining the graph"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # d total' / d x = grad_total * d total / d x: `grad_total` is 1 / count of the batch's tokens, a scalar.
        return *(None if gradient is None else gradient.mul_(grad_total) for gradient in gradients), None
