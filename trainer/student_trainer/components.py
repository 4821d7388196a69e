"""Teacher, tokenizer, data and student of a run, checked against each other: what training and `check` both need.

Built by `build_components` and passed to everything that opens a part of the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from student_trainer.batch.batch import Kind
from student_trainer.batch.head import Head
from student_trainer.data.loader import BatchSource
from student_trainer.losses.terms import Term
from student_trainer.settings import Settings
from student_trainer.students.student import Student
from student_trainer.targets.attention import NO_TOKENS, AttentionSource, BesideTokens
from student_trainer.targets.open import Teacher
from student_trainer.targets.protocol import Targets, spec_for
from teacher_proto.client.waiting import Waiting
from teacher_proto.requests import TargetSpec


@dataclass(frozen=True, eq=False)
class Components:
    """The parts that a run, `check` and `influence` have in common."""

    teacher: Teacher | None
    tokenizer: PreTrainedTokenizerBase
    source: BatchSource
    student: Student
    head: Head | None  # the teacher's, if a loss or metric covers the whole vocabulary
    attention: AttentionSource | None = None

    def reason(self) -> str:
        """What is known about an outage of the teacher or the attention service; empty if there is none."""
        known = (self.teacher.targets.outage() if self.teacher else "", self.attention.reason if self.attention else "")
        return "; ".join(filter(None, known))

    def describe_waiting(self) -> str:
        """What is being waited for, for the terminal: an outage, or requests in flight. Empty if there are none."""
        waiting = self.waiting()
        return self.reason() or (f"{waiting.what}: {waiting.describe()}" if waiting is not None else "")

    def waiting(self) -> Waiting | None:
        """Progress of all requests in flight, to the teacher and the attention service together."""
        return Waiting.sum_of(
            (
                self.teacher.targets.waiting() if self.teacher else None,
                self.attention.waiting() if self.attention else None,
            )
        )

    @property
    def targets(self) -> Targets | None:
        """Where a batch's targets come from: those of its tokens, and of attention if a loss needs them."""
        targets = self.teacher.targets if self.teacher else None
        return targets if targets is None or self.attention is None else BesideTokens(targets, self.attention)

    def spec(self, settings: Settings, terms: Iterable[Term], kind: Kind = "data") -> TargetSpec | None:
        """What these terms need to request for a batch of this kind; None: nothing."""
        spec = spec_for(terms, settings.teacher.top_k, settings.distillation)
        return NO_TOKENS if spec is None and kind == "data" and self.attention is not None else spec
