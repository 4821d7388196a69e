"""What a run and a check of one have in common: teacher, tokenizer, data and student, each held against the others.

Put together by `build_components`; whoever makes something of a run out of its settings is handed it.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from student_trainer.batch.teacher_rows import TeacherHead
from student_trainer.data.loader import BatchSource
from student_trainer.students.student import Student
from student_trainer.targets.attention import AttentionSource
from student_trainer.targets.open import Teacher
from teacher_proto.client.waiting import Waiting


@dataclass(frozen=True, eq=False)
class Components:
    """What a run and a check of one have in common."""

    teacher: Teacher | None
    tokenizer: PreTrainedTokenizerBase
    source: BatchSource
    student: Student
    head: TeacherHead | None  # the teacher's, where something is compared over the whole vocabulary
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
