"""The formula of every token loss, by kind: `DIVERGENCES` and `LABEL_LOSSES`. Called by `passes`.

A divergence is (log_p_NB, log_q_NB, settings) -> (value_N, slope_NB), with p the teacher and q the student over the
same buckets, `value` in nats and `slope` = d value / d log q, bucket by bucket, as if the q were independent. The
softmax (see `passes`) accounts for q summing to one, which is why a multiple of q may be left out of a slope.
A label loss is (log_q_N, settings) -> (value_N, slope_N), of the label's logprob.
`settings`: those of its kind, see `settings.terms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from student_trainer.settings.terms import JSDSettings, SkewedKLSettings, SkewedReverseKLSettings, TermSettings


def cross_entropy(log_q_label_N: Tensor, settings: TermSettings) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the data's next token: -log q(label)."""
    return -log_q_label_N, log_q_label_N.new_full(log_q_label_N.shape, -1.0)


def forward_kl(log_p_NB: Tensor, log_q_NB: Tensor, settings: TermSettings) -> tuple[Tensor, Tensor]:
    """KL(p‖q) = sum p (log p - log q)."""
    p_NB = log_p_NB.exp()
    # Only the second term of p log p - p log q depends on q.
    return (p_NB * (log_p_NB - log_q_NB)).sum(-1), -p_NB


def reverse_kl(log_p_NB: Tensor, log_q_NB: Tensor, settings: TermSettings) -> tuple[Tensor, Tensor]:
    """KL(q‖p) = sum q (log q - log p)."""
    q_NB = log_q_NB.exp()
    gap_NB = log_q_NB - log_p_NB
    # d / d log q of q (log q - log p) is q gap + q; the multiple of q is left out.
    return (q_NB * gap_NB).sum(-1), q_NB * gap_NB


def jsd(log_p_NB: Tensor, log_q_NB: Tensor, settings: JSDSettings) -> tuple[Tensor, Tensor]:
    """beta KL(p‖m) + (1 - beta) KL(q‖m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, equation 1)."""
    beta = settings.beta
    log_m_NB = torch.logaddexp(log_p_NB + math.log(beta), log_q_NB + math.log1p(-beta))
    # Slope: (1 - beta) q (log q - log m + 1) - m d log m / d log q, of which the latter is (1 - beta) q: what is left
    # is the student's summand itself.
    student_NB = (1.0 - beta) * log_q_NB.exp() * (log_q_NB - log_m_NB)
    teacher_NB = beta * log_p_NB.exp() * (log_p_NB - log_m_NB)
    return (teacher_NB + student_NB).sum(-1), student_NB


def skewed_kl(log_p_NB: Tensor, log_q_NB: Tensor, settings: SkewedKLSettings) -> tuple[Tensor, Tensor]:
    """KL(p‖m) with m = alpha p + (1 - alpha) q (DistiLLM, arXiv 2402.03898).

    The mixture keeps the logarithm finite where one distribution has mass and the other has none.
    """
    log_m_NB = _log_mixture(log_p_NB, log_q_NB, settings.alpha)
    p_NB = log_p_NB.exp()
    # d log m / d log q = (1 - alpha) q / m.
    slope_NB = -(1.0 - settings.alpha) * (log_p_NB + log_q_NB - log_m_NB).exp()
    return (p_NB * (log_p_NB - log_m_NB)).sum(-1), slope_NB


def skewed_reverse_kl(log_p_NB: Tensor, log_q_NB: Tensor, settings: SkewedReverseKLSettings) -> tuple[Tensor, Tensor]:
    """KL(q‖m) with m = (1 - alpha) p + alpha q (DistiLLM, arXiv 2402.03898)."""
    log_m_NB = _log_mixture(log_q_NB, log_p_NB, settings.alpha)
    q_NB = log_q_NB.exp()
    gap_NB = log_q_NB - log_m_NB
    # d / d log q of q (log q - log m): q gap + q (1 - alpha q / m).
    slope_NB = q_NB * (gap_NB + 1.0 - settings.alpha * gap_NB.exp())
    return (q_NB * gap_NB).sum(-1), slope_NB


def _log_mixture(log_a_NB: Tensor, log_b_NB: Tensor, alpha: float) -> Tensor:
    return torch.logaddexp(log_a_NB + math.log(alpha), log_b_NB + math.log1p(-alpha))


def tvd(log_p_NB: Tensor, log_q_NB: Tensor, settings: TermSettings) -> tuple[Tensor, Tensor]:
    """Total variation distance: half of sum |p - q|; where p = q the slope is 0."""
    q_NB = log_q_NB.exp()
    gap_NB = q_NB - log_p_NB.exp()
    return 0.5 * gap_NB.abs().sum(-1), 0.5 * q_NB * gap_NB.sign()


def sampled_cross_entropy(log_p_NB: Tensor, log_q_NB: Tensor, settings: TermSettings) -> tuple[Tensor, Tensor]:
    """-sum t log q with t = count / draws, of ids drawn from the teacher (RS-KD, arXiv 2503.16870): unbiased for the
    cross-entropy with the whole teacher, gradient included.

    It does not go to 0 where student and teacher agree, but to the teacher's entropy (in the mean over draws).
    """
    target_NB = log_p_NB.exp()
    return -(target_NB * log_q_NB).sum(-1), -target_NB


# `Any`: each takes the settings of its own kind.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]] = {
    "top_k_kl": forward_kl,
    "forward_kl": forward_kl,
    "tcs": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "tvd": tvd,
    "sampled": sampled_cross_entropy,
}
LABEL_LOSSES: dict[str, Callable[[Tensor, Any], tuple[Tensor, Tensor]]] = {"cross_entropy": cross_entropy}
