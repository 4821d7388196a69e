"""The generalised Jensen-Shannon divergence. Called by `passes` through the registry; shape of functions as in `kl`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_trainer.losses.terms import Term


def jsd(log_p_NB: Tensor, log_q_NB: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """beta KL(p‖m) + (1 - beta) KL(q‖m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, equation 1)."""
    beta = term.beta
    log_m_NB = torch.logaddexp(log_p_NB + math.log(beta), log_q_NB + math.log1p(-beta))
    student_NB = (1.0 - beta) * log_q_NB.exp() * (log_q_NB - log_m_NB)
    teacher_NB = beta * log_p_NB.exp() * (log_p_NB - log_m_NB)
    return (teacher_NB + student_NB).sum(-1), student_NB
