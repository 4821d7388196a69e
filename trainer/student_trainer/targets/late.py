"""Requests made between two updates, because they depend on the student's current weights: they add to a prefetched
batch the targets that its losses still lack. Made by `build`, called by `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from student_trainer.batch.batch import Kind
from student_trainer.data.classification import one_set_of_words
from student_trainer.losses.kinds import all_terms, terms_of
from student_trainer.losses.terms import Needs, TeacherTerm, Term
from student_trainer.settings import Settings
from student_trainer.students.student import Student
from student_trainer.targets.background import EventThread
from student_trainer.targets.lookahead import Lookahead
from student_trainer.targets.open import Teacher
from student_trainer.targets.prefetch import Ready
from student_trainer.targets.student_support import StudentSupport


@dataclass(frozen=True, eq=False)
class LateQueries:
    """Both are None in a run without requests that depend on the student."""

    lookahead: Lookahead | None = None
    support: StudentSupport | None = None

    def due(self, kind: Kind, terms: tuple[Term, ...]) -> bool:
        """Whether a batch of this kind needs such requests for these losses. All ranks agree on it."""
        return self._looks_ahead(kind) or self._gathers(terms)

    def add(
        self, student: Student, ready: Ready, terms: tuple[Term, ...], while_waiting: Callable[[float], None]
    ) -> Ready:
        """The batch with lookahead rows for masked tokens, if the run uses lookahead, and with the teacher's logprobs
        at the student's likeliest ids, if a loss needs them.
        """
        # Lookahead comes first: it replaces top-K rows, and the support is added beside them.
        if self._looks_ahead(ready.batch.kind):
            assert self.lookahead is not None
            ready = self.lookahead.add(student, ready, while_waiting)
        if self._gathers(terms):
            assert self.support is not None
            ready = self.support.add(student, ready, while_waiting)
        return ready

    def _looks_ahead(self, kind: Kind) -> bool:
        return self.lookahead is not None and kind == "data"

    def _gathers(self, terms: tuple[Term, ...]) -> bool:
        return self.support is not None and bool(Needs.of(terms).late)


def asks_late(settings: Settings) -> bool:
    """Whether a run with these settings makes requests between two updates."""
    return settings.distillation.lookahead.window is not None or bool(Needs.of(all_terms(settings)).late)


def open_late(
    settings: Settings, student: Student, teacher: Teacher | None, tokenizer: Any, thread: EventThread
) -> LateQueries:
    """The late requests of a run. ValueError if lookahead is set but student, teacher or losses can't use it."""
    support = None
    if teacher is not None and Needs.of(all_terms(settings)).late:
        wanted = settings.distillation
        words = one_set_of_words(settings.data, tokenizer) if wanted.gather_at == "labels" else ()
        support = StudentSupport(teacher.targets, thread, wanted.gather_k, words)
    return LateQueries(_lookahead(settings, student, teacher, thread), support)


def _lookahead(settings: Settings, student: Student, teacher: Teacher | None, thread: EventThread) -> Lookahead | None:
    wanted = settings.distillation.lookahead
    if wanted.window is None:
        return None
    if student.autoregressive:
        raise ValueError(
            "distillation.lookahead.window is set, but the student predicts each token from the preceding ones only: "
            "it never sees the following tokens; use student=diffusion, or leave it out"
        )
    if teacher is None or "score" not in teacher.card.kinds:
        who = "there is no teacher" if teacher is None else f"the teacher {teacher.card.name} does not serve kind score"
        raise ValueError(f"distillation.lookahead.window is set, but {who}: leave it out")
    if wanted.candidates > settings.teacher.top_k:
        raise ValueError(
            f"distillation.lookahead.candidates is {wanted.candidates}, but teacher.top_k is {settings.teacher.top_k}: "
            "candidates are taken from the teacher's top K, use fewer"
        )
    if not any(isinstance(t, TeacherTerm) and t.support == "top_k" for t in terms_of(settings.distillation)):
        raise ValueError("distillation.lookahead.window is set, but no loss compares with the teacher's top K")
    return Lookahead(teacher.targets, thread, wanted, settings.run.seed)
