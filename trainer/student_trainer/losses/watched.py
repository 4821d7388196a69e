"""Figures that a mixture policy goes by and that the loss may not have: terms of coefficient 0, which change no
gradient. Made by `build`, from what the policy says that it watches.

Those of a token ride along in the softmax that the loss takes anyway; the teacher's cross-entropy is in every target.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.losses.kinds import token_term
from student_trainer.losses.terms import Captured, Needs, StatesTerm, Term
from student_trainer.settings.terms import CrossEntropySettings


@dataclass(frozen=True)
class TeacherCrossEntropy(StatesTerm):
    """The teacher's own cross-entropy with the data's next token, which no student changes."""

    @property
    def needs(self) -> Needs:
        return Needs(kinds=frozenset({"top_k"}))

    def values(self, captured: Captured, micro: MicroBatch, config: Any) -> Tensor:
        """[N] float32. ValueError where the teacher does not say it."""
        teacher = micro.teacher
        if teacher is None or teacher.next_logprob_N is None:
            raise ValueError(
                "data.mixture.policy=excess compares with the teacher's logprob of the data's next token "
                "(next_logprob), which these targets have not: take a teacher that gives it, or policy divergence"
            )
        return -teacher.next_logprob_N.float()


WATCHED: dict[str, Term] = {
    "student_cross_entropy": token_term("student_cross_entropy", "cross_entropy", 0.0),
    "teacher_cross_entropy": TeacherCrossEntropy("teacher_cross_entropy", CrossEntropySettings(coefficient=0.0), 0.0),
    "teacher_divergence": token_term("teacher_divergence", "top_k_kl", 0.0),
}


def watched_terms(names: Iterable[str], own: Collection[str]) -> tuple[Term, ...]:
    """The terms of these names. ValueError where the loss has one of the same name (`own`)."""
    names = tuple(names)
    if taken := [name for name in names if name in own]:
        raise ValueError(f"the loss has a term '{taken[0]}', the name of a figure of data.mixture: rename it")
    return tuple(WATCHED[name] for name in names)
