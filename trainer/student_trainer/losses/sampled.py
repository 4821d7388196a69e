"""Cross-entropy with ids drawn from the teacher (RS-KD, arXiv 2503.16870). Called by `passes`, shape as in `kl`."""

from __future__ import annotations

from torch import Tensor

from student_trainer.losses.terms import Term


def sampled_cross_entropy(log_p_NB: Tensor, log_q_NB: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """-sum t log q with t = count / draws: unbiased for the cross-entropy with the whole teacher, gradient included.

    It does not go to 0 where student and teacher agree, but to the teacher's entropy (in the mean over draws).
    """
    target_NB = log_p_NB.exp()
    return -(target_NB * log_q_NB).sum(-1), -target_NB
