"""Total variation distance. Called by `passes` through the registry; shape of functions as in `kl`."""

from __future__ import annotations

from torch import Tensor

from student_trainer.losses.terms import Term


def tvd(log_p_NB: Tensor, log_q_NB: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """Half of sum |p - q|; where p = q the slope is 0."""
    q_NB = log_q_NB.exp()
    gap_NB = q_NB - log_p_NB.exp()
    return 0.5 * gap_NB.abs().sum(-1), 0.5 * q_NB * gap_NB.sign()
