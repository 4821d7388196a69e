"""Kullback-Leibler divergences between two distributions over the same buckets. Called by `passes`.

Every divergence of this package has one shape: (log_p_NB, log_q_NB, term) -> (value_N, slope_NB), p the teacher, q the
student, `value` in nats and `slope` = d value / d log q, bucket by bucket, as if the q were free. That q sums to one
comes in with the softmax (see `passes`), which is why a multiple of q may be left out of a slope.
"""

from __future__ import annotations

from torch import Tensor

from student_trainer.losses.terms import Term


def forward_kl(log_p_NB: Tensor, log_q_NB: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """KL(p‖q) = sum p (log p - log q)."""
    p_NB = log_p_NB.exp()
    return (p_NB * (log_p_NB - log_q_NB)).sum(-1), -p_NB


def reverse_kl(log_p_NB: Tensor, log_q_NB: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """KL(q‖p) = sum q (log q - log p)."""
    q_NB = log_q_NB.exp()
    gap_NB = log_q_NB - log_p_NB
    return (q_NB * gap_NB).sum(-1), q_NB * gap_NB
