"""What a run and a check of one have in common: teacher, tokenizer, data and student, each held against the others.

Put together by `build_components`; whoever makes something of a run out of its settings is handed it.
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
    """What a run and a check of one have in common."""

    teacher: Teacher | None
    tokenizer: PreTrainedTokenizerBase
    source: BatchSource
    student: Student
    head: Head | None  # the teacher's, where something is compared over the whole vocabulary
    attention: AttentionSource | None = None

    def reason(self) -> str:
        """What is known of an outage of those who are asked for targets."""
        known = (self.teacher.targets.outage() if self.teacher else "", self.attention.reason if self.attention else "")
        return "; ".join(filter(None, known))

    def describe_waiting(self) -> str:
        """What is known of those who are asked for targets, for the terminal; empty where nothing is asked."""
        waiting = self.waiting()
        return self.reason() or (f"{waiting.what}: {waiting.describe()}" if waiting is not None else "")

    def waiting(self) -> Waiting | None:
        """How far everything is that those who are asked for targets were asked."""
        return Waiting.sum_of(
            (
                self.teacher.targets.waiting() if self.teacher else None,
                self.attention.waiting() if self.attention else None,
            )
        )

    @property
    def targets(self) -> Targets | None:
        """Who answers for batches: for their tokens, and for attention beside them where a loss wants that."""
        targets = self.teacher.targets if self.teacher else None
        return targets if targets is None or self.attention is None else BesideTokens(targets, self.attention)

    def spec(self, settings: Settings, terms: Iterable[Term], kind: Kind = "data") -> TargetSpec | None:
        """What is asked about a batch of this kind for these terms; None: nothing."""
        spec = spec_for(terms, settings.teacher.top_k, settings.distillation)
        return NO_TOKENS if spec is None and kind == "data" and self.attention is not None else spec
