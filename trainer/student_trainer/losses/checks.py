"""Checks on the arguments of `head.head_loss`. Called by `head`, and by `metrics` for the deferred ones.

What can be checked without reading a tensor's values is refused at once. The rest are deferred checks: a GPU is waited
for only once for all of them, at the end of a call or of a step. Until then bad values do no harm: no id reads or
writes outside its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.supports import SUPPORTS, Support
from student_trainer.losses.terms import TeacherTerm, TokenTerm

IGNORED = -100

# A scalar tensor that is True if something is wrong, and a function that returns the message.
DeferredCheck = tuple[Tensor, Callable[[], str]]


def raise_failed(checks: Sequence[DeferredCheck], flags: Sequence[float] | None = None) -> None:
    """ValueError with the message of the first failed check. `flags`: the result of `flags_of`, as numbers."""
    if flags is None:
        flags = flags_of(checks).tolist() if checks else []
    for wrong, (_, words) in zip(flags, checks, strict=True):
        if wrong:
            raise ValueError(words())


def flags_of(checks: Sequence[DeferredCheck]) -> Tensor:
    """Booleans on the device, one per check; at least one check."""
    return torch.stack([wrong for wrong, _ in checks])


def check_shapes(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, terms: Sequence[TokenTerm], weights_N: Tensor | None = None
) -> None:
    """ValueError if shapes disagree, if there are no terms, or if two share a name."""
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"got hidden states {tuple(hidden_ND.shape)} and head {tuple(weight_VD.shape)}, "
            "expected [rows, width] and [vocabulary, width]"
        )
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"got labels {tuple(labels_N.shape)}, expected one for each of {len(hidden_ND)} rows")
    if weights_N is not None and weights_N.shape != labels_N.shape:
        raise ValueError(f"got weights {tuple(weights_N.shape)}, expected one for each of {len(hidden_ND)} rows")
    names = [term.name for term in terms]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"got losses named {names}, expected at least one, all with different names")


def check_labels(labels_N: Tensor, vocab_size: int) -> Iterator[DeferredCheck]:
    """Deferred check for a label that is neither ignored nor an id of the student."""
    # A tensor, not yet a number: reading it would wait for the device.
    wrong_N = (labels_N != IGNORED) & ((labels_N < 0) | (labels_N >= vocab_size))

    def words() -> str:
        row = int(wrong_N.nonzero()[0])
        return f"label {int(labels_N[row])} on row {row}: expected {IGNORED} or an id below {vocab_size}"

    yield wrong_N.any(), words


def shared_width(shared_vocab: int | None, vocab_size: int) -> int:
    """The number of leading ids that distillation compares; ValueError if it is 0 or more than the student has."""
    if shared_vocab is None:
        return vocab_size
    if not 0 < shared_vocab <= vocab_size:
        raise ValueError(f"got shared_vocab {shared_vocab}, expected 1 to the student's vocabulary of {vocab_size}")
    return shared_vocab


def rows_that_count(term: TokenTerm, labels_N: Tensor, teacher: TeacherRows | None) -> Tensor:
    """Bool [N]: which rows the term sums over. ValueError if teacher and student have different numbers of rows."""
    if not isinstance(term, TeacherTerm) or teacher is None or teacher.valid_N is None:
        return labels_N != IGNORED
    if teacher.valid_N.shape != labels_N.shape:
        raise ValueError(f"got {len(teacher.valid_N)} teacher rows for {len(labels_N)} rows of the student")
    return teacher.valid_N.to(labels_N.device, torch.bool)


def check_targets(
    term: TokenTerm, teacher: TeacherRows | None, counted_N: Tensor, limit: int | None
) -> Iterator[DeferredCheck]:  # fmt: skip
    """ValueError if the term needs targets that `teacher` lacks; deferred checks of NaN and ids not in [0, limit)."""
    if not isinstance(term, TeacherTerm):
        return
    support = SUPPORTS[term.support]
    missing = [name for name in support.fields if teacher is None or getattr(teacher, name) is None]
    if teacher is None or missing:
        raise ValueError(f"loss '{term.name}' needs the target kind '{support.kind}' ({', '.join(missing)} not given)")
    if support.student == "vocabulary":
        _check_full(term, teacher, counted_N)
    elif support.drawn:
        yield from _check_sampled(term, teacher, counted_N, limit)
    else:
        yield from _check_ids(term, support, teacher, counted_N, limit)


def _check_ids(
    term: TeacherTerm, support: Support, teacher: TeacherRows, counted_N: Tensor, limit: int | None
) -> Iterator[DeferredCheck]:
    ids_NK, logprobs_NK = (getattr(teacher, name) for name in support.fields)
    tempered = support.largest and teacher.tempered_at(term.temperature) is not None
    log_z_N = None if tempered else teacher.log_z_at(term.temperature)
    if ids_NK.shape != logprobs_NK.shape or len(ids_NK) != len(counted_N):
        raise ValueError(
            f"loss '{term.name}': got ids {tuple(ids_NK.shape)} and logprobs {tuple(logprobs_NK.shape)}, "
            f"expected [{len(counted_N)}, K] for both"
        )
    if ids_NK.numel() == 0:
        return
    nan_N = torch.isnan(logprobs_NK).any(-1)
    if log_z_N is not None:
        nan_N = nan_N | ~torch.isfinite(log_z_N)
    nan = (nan_N & counted_N).any()
    yield nan, lambda: f"loss '{term.name}': the teacher's logprobs or log_z contain NaN on a row that counts"
    used_NK = torch.where(counted_N[:, None], ids_NK.long(), 0)
    if support.distinct:
        twice_N = (used_NK.sort(-1).values.diff(dim=-1) == 0).any(-1) & counted_N
        words = f"loss '{term.name}': a row of gather_ids has the same id twice, expected distinct ids"
        yield twice_N.any(), lambda: words
    yield _check_range(term, used_NK, limit)


def _check_sampled(
    term: TeacherTerm, teacher: TeacherRows, counted_N: Tensor, limit: int | None
) -> Iterator[DeferredCheck]:
    assert teacher.sampled_offsets is not None and teacher.sampled_ids is not None
    if len(teacher.sampled_offsets) != len(counted_N) + 1:
        raise ValueError(
            f"loss '{term.name}': got {len(teacher.sampled_offsets)} offsets, expected {len(counted_N) + 1}"
        )
    if term.temperature != teacher.sampled_temperature:
        raise ValueError(
            f"loss '{term.name}' has temperature {term.temperature}, but the teacher's samples were drawn at "
            f"{teacher.sampled_temperature}; request samples at the same temperature"
        )
    if teacher.sampled_ids.numel():
        yield _check_range(term, teacher.sampled_ids.long(), limit)


def _check_range(term: TeacherTerm, ids: Tensor, limit: int | None) -> DeferredCheck:
    least, largest = ids.aminmax()

    def words() -> str:
        return (
            f"loss '{term.name}': the teacher's ids are from {int(least)} to {int(largest)}, expected 0 to "
            f"{'any' if limit is None else limit - 1}; does the teacher have another vocabulary? "
            "If both share their first ids, set shared_vocab to their number"
        )

    return (least < 0) if limit is None else (least < 0) | (largest >= limit), words


def _check_full(term: TeacherTerm, teacher: TeacherRows, counted_N: Tensor) -> None:
    assert teacher.teacher_hidden_NE is not None and teacher.teacher_head is not None
    weight_VE = teacher.teacher_head.weight_VD
    if teacher.teacher_hidden_NE.shape != (len(counted_N), weight_VE.shape[1]):
        raise ValueError(
            f"loss '{term.name}': got teacher_hidden_NE {tuple(teacher.teacher_hidden_NE.shape)} for a head of "
            f"{tuple(weight_VE.shape)}, expected [{len(counted_N)}, {weight_VE.shape[1]}]"
        )
