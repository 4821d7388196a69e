"""The ids that a loss compares on and the teacher's probabilities there, with the tail of the top K as one more bucket
(K + 1). `SUPPORTS` lists them. Called by `passes`, `checks` and `terms`.

Every distillation term compares the two models conditional on the token being one that both have (`width` leading ids):
the student's softmax is taken over those, and the teacher's known mass beyond them is divided out. So a padded head, an
added token or a larger teacher vocabulary changes nothing for student == teacher, in any divergence. Cross-entropy
keeps the student's whole vocabulary, and so reduces any mass on the other ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from student_trainer.batch.teacher_rows import TeacherRows
from teacher_proto.requests import Kind

# The least tail mass, unless a smaller upper bound is known. Logprobs are rounded to fp16, so on peaked rows one minus
# the sum of the probabilities may be zero or below, where a divergence with log p of the tail would be infinite.
TAIL_FLOOR = 1e-7
# Above the relative error of any probability whose logarithm is rounded to fp16 (1.6 % at e^-32).
ROUNDING = 1.02
# Stands for log 0: small enough that its exponential vanishes beside any probability, yet finite.
LOG_FLOOR = -87.0


@dataclass(frozen=True)
class SupportRows:
    """N rows of a support of K ids at one temperature.

    `live_NK` is False for padding, for ids beyond the shared ones, and on rows that do not count; there `ids_NK`
    repeats the row's first live id, or 0 if it has none, and `logprobs_NK` is LOG_FLOOR. `outside_N`: the teacher's
    mass on listed ids beyond the shared ones. `most_N`: the most that any unlisted id can have.
    """

    ids_NK: Tensor
    live_NK: Tensor
    logprobs_NK: Tensor
    outside_N: Tensor
    most_N: Tensor


def read_support(rows: TeacherRows, support: str, temperature: float, width: int, counted_N: Tensor) -> SupportRows:
    """Rows of the support named `support` ("top_k", "gather" or "sampled"); `counted_N` says which rows count."""
    chosen = SUPPORTS[support]
    assert chosen.read is not None, "the full vocabulary has no list of ids"
    ids_NK, logprobs_NK = chosen.read(rows, temperature)
    named_NK = counted_N[:, None] & (logprobs_NK > LOG_FLOOR)
    live_NK = named_NK & (ids_NK >= 0) & (ids_NK < width)
    # Teacher mass on ids beyond the shared ones, which is neither in the support nor in the tail.
    outside_N = torch.where(named_NK & ~live_NK, logprobs_NK.exp(), 0.0).sum(-1)
    least_N = torch.where(counted_N[:, None], logprobs_NK, LOG_FLOOR).amin(-1)
    # argmax takes the first of equal values: the first live id.
    first_N1 = live_NK.to(torch.uint8).argmax(-1, keepdim=True)
    # Mixed teachers keep the K likeliest according to what each of them lists: an unlisted id may have more.
    bounds = chosen.largest and rows.tempered_logprobs_NKT is None
    spare_N1 = torch.where(live_NK.any(-1, keepdim=True), ids_NK.gather(1, first_N1), 0)
    return SupportRows(
        ids_NK=torch.where(live_NK, ids_NK, spare_N1),
        live_NK=live_NK,
        logprobs_NK=torch.where(live_NK, logprobs_NK, LOG_FLOOR),
        outside_N=outside_N,
        most_N=least_N.exp() * ROUNDING if bounds else torch.ones_like(outside_N),
    )


def with_tail(support: SupportRows, width: int) -> Tensor:
    """Logprobs [N, K + 1] of probabilities that sum to one: the support's ids, then all the rest in one bucket.

    One minus the sum over the support carries the rounding errors of all its logprobs, which on peaked rows are many
    times the tail. So it is bounded by the most that the unlisted ids can have: next to the K largest, each has at most
    the least of these. Where rounding has pushed the sum past one the buckets are scaled back, so that a student equal
    to the teacher is at a minimum and not on a slope.
    """
    log_tail_N, log_mass_N = tail_of(support, width)
    return torch.cat([support.logprobs_NK, log_tail_N[:, None]], 1) - log_mass_N[:, None]


def tail_of(support: SupportRows, width: int) -> tuple[Tensor, Tensor]:
    """(logprob [N] of everything outside the support, logarithm [N] of that mass plus the support's)."""
    mass_N = torch.where(support.live_NK, support.logprobs_NK.exp(), 0.0).sum(-1)
    tail_N = (1.0 - mass_N - support.outside_N).clamp_min(TAIL_FLOOR)
    # At most `most_N` on each of the unlisted ids.
    tail_N = torch.minimum(tail_N, support.most_N * (width - support.live_NK.sum(-1)))
    return tail_N.log().clamp_min(LOG_FLOOR), (mass_N + tail_N).log()


def renormalised(logprobs_NK: Tensor, live_NK: Tensor) -> Tensor:
    """Logprobs [N, K] renormalised over the live ids; LOG_FLOOR elsewhere."""
    masked_NK = torch.where(live_NK, logprobs_NK, LOG_FLOOR)
    return torch.where(live_NK, masked_NK - masked_NK.logsumexp(-1, keepdim=True), LOG_FLOOR)


def _top_k(rows: TeacherRows, temperature: float) -> tuple[Tensor, Tensor]:
    assert rows.ids_NK is not None and rows.logprobs_NK is not None
    tempered_NK = rows.tempered_at(temperature)
    if tempered_NK is None:
        tempered_NK = _softened(rows.logprobs_NK, rows, temperature)
    return rows.ids_NK.long(), tempered_NK.clamp_min(LOG_FLOOR)


def _gather(rows: TeacherRows, temperature: float) -> tuple[Tensor, Tensor]:
    assert rows.gather_ids_NG is not None and rows.gather_logprobs_NG is not None
    return rows.gather_ids_NG.long(), _softened(rows.gather_logprobs_NG, rows, temperature)


def _sampled(rows: TeacherRows, temperature: float) -> tuple[Tensor, Tensor]:
    ids_NU, counts_NU = rows.sampled_padded()
    draws_N1 = counts_NU.sum(-1, keepdim=True).clamp_min(1)
    # The empirical distribution: count / draws.
    return ids_NU, (counts_NU / draws_N1).log().clamp_min(LOG_FLOOR)


def _softened(logprobs_NK: Tensor, rows: TeacherRows, temperature: float) -> Tensor:
    """Logprobs at `temperature` from those at 1: logprob / T - log_z, exact (see `teacher_rows.TeacherRows`)."""
    log_z_N = rows.log_z_at(temperature)
    # Served in fp16; log_z is fp32, and so is all arithmetic.
    logprobs_NK = logprobs_NK.to(torch.promote_types(logprobs_NK.dtype, torch.float32))
    if log_z_N is not None:
        logprobs_NK = logprobs_NK / temperature - log_z_N[:, None]
    return logprobs_NK.clamp_min(LOG_FLOOR)


@dataclass(frozen=True)
class Support:
    """The ids that a loss compares on, and where the teacher's probabilities there come from.

    `kind`: the kind of targets to request. `fields`: fields of `TeacherRows`, all of which must be present.
    `student`: how the student's distribution is used: "ids and the rest" in one more bucket (or without it, if the loss
    renormalises), "ids" for a weighted sum over their logprobs, or the whole "vocabulary".
    `read`: (rows, temperature) -> (ids, logprobs at the temperature) [N, K]; None for a whole vocabulary, which
    `chunks` computes from hidden states. `ahead`: whether it is requested with the batch, not when a step begins.
    `normalised`: whether a temperature other than 1 needs the teacher's normaliser at it; `drawn`: whether the teacher
    samples at the temperature. `largest`: no unlisted id has more mass than the least of them. `distinct`: whether to
    check that the ids are distinct, since the student chose them.
    """

    kind: Kind
    fields: tuple[str, ...]
    student: Literal["ids and the rest", "ids", "vocabulary"]
    read: Callable[[TeacherRows, float], tuple[Tensor, Tensor]] | None = None
    ahead: bool = True
    normalised: bool = False
    drawn: bool = False
    largest: bool = False
    distinct: bool = False


SUPPORTS: dict[str, Support] = {
    "top_k": Support(
        "top_k", ("ids_NK", "logprobs_NK"), "ids and the rest", _top_k, normalised=True, largest=True,
    ),
    "gather": Support(
        "gather", ("gather_ids_NG", "gather_logprobs_NG"), "ids and the rest", _gather, ahead=False, normalised=True,
        distinct=True,
    ),
    "sampled": Support(
        "sampled", ("sampled_offsets", "sampled_ids", "sampled_counts"), "ids", _sampled, drawn=True
    ),
    "full": Support("hidden", ("teacher_hidden_NE", "teacher_head"), "vocabulary"),
}  # fmt: skip
