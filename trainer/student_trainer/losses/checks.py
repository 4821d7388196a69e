"""What a call of `head.head_loss` must satisfy, checked before any product is made. Called by `head`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from student_trainer.losses.rows import TeacherRows
from student_trainer.losses.terms import Term

IGNORED = -100

# What each support reads, and the word to ask the teacher for.
_FIELDS = {
    "top_k": (("ids_NK", "logprobs_NK"), "top_k"),
    "gather": (("gather_ids_NG", "gather_logprobs_NG"), "gather"),
    "sampled": (("sampled_offsets", "sampled_ids", "sampled_counts"), "sampled"),
    "full": (("teacher_hidden_NE", "teacher_head"), "hidden"),
}


def check_shapes(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, terms: Sequence[Term]) -> None:
    """ValueError where shapes disagree, a label is out of range, or two terms share a name."""
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"got hidden states {tuple(hidden_ND.shape)} and head {tuple(weight_VD.shape)}, "
            "expected [rows, width] and [vocabulary, width]"
        )
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"got labels {tuple(labels_N.shape)}, expected one for each of {len(hidden_ND)} rows")
    wrong_N = (labels_N != IGNORED) & ((labels_N < 0) | (labels_N >= weight_VD.shape[0]))
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        raise ValueError(
            f"label {int(labels_N[row])} on row {row}: expected {IGNORED} or an id below {weight_VD.shape[0]}"
        )
    names = [term.name for term in terms]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"got losses named {names}, expected at least one, and each name once")


def shared_width(shared_vocab: int | None, vocab_size: int) -> int:
    """The number of leading ids that distillation compares; ValueError if there are none or more than the student's."""
    if shared_vocab is None:
        return vocab_size
    if not 0 < shared_vocab <= vocab_size:
        raise ValueError(f"got shared_vocab {shared_vocab}, expected 1 to the student's vocabulary of {vocab_size}")
    return shared_vocab


def rows_that_count(term: Term, labels_N: Tensor, teacher: TeacherRows | None) -> Tensor:
    """Bool [N]: which rows the term sums over. ValueError if the teacher's rows are not as many as the student's."""
    if term.kind == "cross_entropy" or teacher is None or teacher.valid_N is None:
        return labels_N != IGNORED
    if teacher.valid_N.shape != labels_N.shape:
        raise ValueError(f"got {len(teacher.valid_N)} teacher rows for {len(labels_N)} rows of the student")
    return teacher.valid_N.to(labels_N.device, torch.bool)


def check_targets(term: Term, teacher: TeacherRows | None, counted_N: Tensor, limit: int | None) -> None:
    """ValueError if the term needs what `teacher` has not, or if a counted row names an id of `limit` or more."""
    if term.kind == "cross_entropy":
        return
    wanted, request = _FIELDS[term.support]
    missing = [name for name in wanted if teacher is None or getattr(teacher, name) is None]
    if teacher is None or missing:
        raise ValueError(f"loss '{term.name}' needs the target kind '{request}' ({', '.join(missing)} not given)")
    if term.support == "sampled":
        _check_sampled(term, teacher, counted_N, limit)
    elif term.support == "full":
        _check_full(term, teacher, counted_N)
    else:
        ids_NK, logprobs_NK = (getattr(teacher, name) for name in wanted)
        tempered = term.support == "top_k" and teacher.tempered_at(term.temperature) is not None
        log_z_N = None if tempered else teacher.log_z_at(term.temperature)
        _check_ids(term, ids_NK, logprobs_NK, log_z_N, counted_N, limit)


def _check_ids(
    term: Term, ids_NK: Tensor, logprobs_NK: Tensor, log_z_N: Tensor | None, counted_N: Tensor, limit: int | None
) -> None:
    if ids_NK.shape != logprobs_NK.shape or len(ids_NK) != len(counted_N):
        raise ValueError(
            f"loss '{term.name}': got ids {tuple(ids_NK.shape)} and logprobs {tuple(logprobs_NK.shape)}, "
            f"expected [{len(counted_N)}, K] twice"
        )
    used_MK = ids_NK.long()[counted_N]
    if used_MK.numel() == 0:
        return
    if bool(torch.isnan(logprobs_NK[counted_N]).any()) or (
        log_z_N is not None and not bool(torch.isfinite(log_z_N[counted_N]).all())
    ):
        raise ValueError(f"loss '{term.name}': the teacher's logprobs or log_z contain NaN on a row that counts")
    if term.support == "gather" and bool((used_MK.sort(-1).values.diff(dim=-1) == 0).any()):
        raise ValueError(f"loss '{term.name}': an id comes twice on a row of gather_ids, expected distinct ids")
    _check_range(term, int(used_MK.min()), int(used_MK.max()), limit)


def _check_sampled(term: Term, teacher: TeacherRows, counted_N: Tensor, limit: int | None) -> None:
    assert teacher.sampled_offsets is not None and teacher.sampled_ids is not None
    if len(teacher.sampled_offsets) != len(counted_N) + 1:
        raise ValueError(
            f"loss '{term.name}': got {len(teacher.sampled_offsets)} offsets, expected {len(counted_N) + 1}"
        )
    if term.temperature != teacher.sampled_temperature:
        raise ValueError(
            f"loss '{term.name}' has temperature {term.temperature}, but the teacher's samples were drawn at "
            f"{teacher.sampled_temperature}; ask for samples at the same temperature"
        )
    if teacher.sampled_ids.numel():
        ids = teacher.sampled_ids.long()
        _check_range(term, int(ids.min()), int(ids.max()), limit)


def _check_range(term: Term, least: int, largest: int, limit: int | None) -> None:
    if least < 0 or (limit is not None and largest >= limit):
        raise ValueError(
            f"loss '{term.name}': the teacher names ids from {least} to {largest}, expected 0 to "
            f"{'any' if limit is None else limit - 1}; is it a teacher of another vocabulary? "
            "If both share their leading ids, say how many with shared_vocab"
        )


def _check_full(term: Term, teacher: TeacherRows, counted_N: Tensor) -> None:
    assert teacher.teacher_hidden_NE is not None and teacher.teacher_head is not None
    weight_VE = teacher.teacher_head.weight_VE
    if teacher.teacher_hidden_NE.shape != (len(counted_N), weight_VE.shape[1]):
        raise ValueError(
            f"loss '{term.name}': got teacher_hidden_NE {tuple(teacher.teacher_hidden_NE.shape)} for a head of "
            f"{tuple(weight_VE.shape)}, expected [{len(counted_N)}, {weight_VE.shape[1]}]"
        )
