"""The oracle: every loss from its definition over whole [rows, vocabulary] arrays, for autograd to differentiate.

Shares no code with the package. Everything is float64 unless the caller hands in something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from student_trainer.losses import TeacherRows, TokenTerm, token_term
from student_trainer.settings.terms import KINDS


def logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    z_NV = hidden_ND @ weight_VD.T
    if bias_V is not None:
        z_NV = z_NV + bias_V
    z_NV = z_NV * scale
    return z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)


def rows_of(
    teacher_NV: Tensor, k: int, temperatures: tuple[float, ...] = (), dtype: torch.dtype | None = None
) -> TeacherRows:
    """What a teacher with these logits serves; `dtype` rounds the logprobs (float16 is the wire's)."""
    lse_N = teacher_NV.logsumexp(-1)
    top = (teacher_NV - lse_N[:, None]).topk(k, -1)
    log_z = [(teacher_NV / t).logsumexp(-1) - lse_N / t for t in temperatures]
    return TeacherRows(
        ids_NK=top.indices.int(),
        logprobs_NK=top.values if dtype is None else top.values.to(dtype),
        lse_N=lse_N,
        log_z_NT=torch.stack(log_z, 1) if log_z else None,
        temperatures=temperatures,
    )


def term_of(kind: str, coefficient: float = 1.0, name: str = "kd", **settings: Any) -> TokenTerm:
    """A term of any kind, with those of the settings that its kind has."""
    own = {field: value for field, value in settings.items() if field in KINDS[kind].model_fields}
    return token_term(name, kind, coefficient, **own)


def divergence(term: TokenTerm, p_NB: Tensor, q_NB: Tensor) -> Tensor:
    """The term's divergence [N] between bucket probabilities, from its textbook formula."""

    def kl(a_NB: Tensor, b_NB: Tensor) -> Tensor:
        return torch.where(a_NB > 0, a_NB * (a_NB.clamp_min(1e-300).log() - b_NB.clamp_min(1e-300).log()), 0.0).sum(-1)

    if term.kind in ("top_k_kl", "tcs", "forward_kl"):
        return kl(p_NB, q_NB)
    if term.kind == "reverse_kl":
        return kl(q_NB, p_NB)
    if term.kind == "jsd":
        m_NB = term.settings.beta * p_NB + (1 - term.settings.beta) * q_NB
        return term.settings.beta * kl(p_NB, m_NB) + (1 - term.settings.beta) * kl(q_NB, m_NB)
    if term.kind == "skewed_kl":
        return kl(p_NB, term.settings.alpha * p_NB + (1 - term.settings.alpha) * q_NB)
    if term.kind == "skewed_reverse_kl":
        return kl(q_NB, (1 - term.settings.alpha) * p_NB + term.settings.alpha * q_NB)
    assert term.kind == "tvd"
    return (p_NB - q_NB).abs().sum(-1) / 2


def bucketed(probability_NV: Tensor, ids_NK: Tensor, tail: str) -> Tensor:
    """Probabilities of the ids, with all the rest in a last bucket or with the rest left out, renormalised or not."""
    named_NK = probability_NV.gather(1, ids_NK)
    if tail == "renormalise":
        return named_NK / named_NK.sum(-1, keepdim=True)
    if tail == "truncate":
        return named_NK
    outside_NV = torch.ones_like(probability_NV).scatter(1, ids_NK, 0.0)
    return torch.cat([named_NK, (probability_NV * outside_NV).sum(-1, keepdim=True)], 1)


def term_values(
    term: TokenTerm,
    student_NV: Tensor,
    labels_N: Tensor,
    teacher_NV: Tensor,
    ids_NK: Tensor | None,
    shared: int | None = None,
) -> Tensor:
    """The term's values [N] on every row, from whole logits of both models."""
    if term.kind == "cross_entropy":
        return torch.nn.functional.cross_entropy(student_NV, labels_N, reduction="none", ignore_index=-100)
    p_NV = (teacher_NV[:, :shared] / term.temperature).softmax(-1)
    q_NV = (student_NV[:, :shared] / term.temperature).softmax(-1)
    if term.support != "full":
        assert ids_NK is not None
        p_NV, q_NV = (bucketed(x, ids_NK, term.settings.tail) for x in (p_NV, q_NV))
    return divergence(term, p_NV, q_NV) * (term.temperature**2 if term.settings.temperature_squared else 1.0)
