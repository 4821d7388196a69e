"""Skewed KL divergences of DistiLLM (arXiv 2402.03898). Called by `passes` through the registry; shape as in `kl`.

The mixture keeps the logarithm finite where the one distribution has mass and the other has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_trainer.losses.terms import Term


def skewed_kl(log_p_NB: Tensor, log_q_NB: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """KL(p‖m) with m = alpha p + (1 - alpha) q."""
    log_m_NB = _log_mixture(log_p_NB, log_q_NB, term.alpha)
    p_NB = log_p_NB.exp()
    slope_NB = -(1.0 - term.alpha) * (log_p_NB + log_q_NB - log_m_NB).exp()
    return (p_NB * (log_p_NB - log_m_NB)).sum(-1), slope_NB


def skewed_reverse_kl(log_p_NB: Tensor, log_q_NB: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """KL(q‖m) with m = (1 - alpha) p + alpha q."""
    log_m_NB = _log_mixture(log_q_NB, log_p_NB, term.alpha)
    q_NB = log_q_NB.exp()
    gap_NB = log_q_NB - log_m_NB
    slope_NB = q_NB * (gap_NB + 1.0 - term.alpha * gap_NB.exp())
    return (q_NB * gap_NB).sum(-1), slope_NB


def _log_mixture(log_a_NB: Tensor, log_b_NB: Tensor, alpha: float) -> Tensor:
    return torch.logaddexp(log_a_NB + math.log(alpha), log_b_NB + math.log1p(-alpha))
