"""The term that compares final hidden states, for a teacher of the student's width. Named by `kinds`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.losses.terms import Captured, Needs, StatesTerm
from student_trainer.settings.terms import FinalHiddenSettings


@dataclass(frozen=True)
class FinalHiddenTerm(StatesTerm):
    """|s - t|^2 / |t|^2 of each row, both after the last norm: the squared error relative to the teacher's square."""

    settings: FinalHiddenSettings

    @property
    def needs(self) -> Needs:
        return Needs(kinds=frozenset({"hidden"}))

    def values(self, captured: Captured, micro: MicroBatch, config: Any) -> Tensor:
        teacher = micro.teacher
        assert teacher is not None and teacher.teacher_hidden_NE is not None, "the batch has no teacher hidden states"
        hidden_ND = captured.hidden_ND[: len(micro.view.labels_N)].float()
        theirs_ND = teacher.teacher_hidden_NE.float()
        if hidden_ND.shape != theirs_ND.shape:
            raise ValueError(
                f"the loss {self.name} (final_hidden) compares hidden states of the same width: the student's is "
                f"{hidden_ND.shape[1]}, the teacher's {theirs_ND.shape[1]}. Use forward_kl with support=full"
            )
        if teacher.valid_N is not None:
            # Where the teacher has no row its numbers may be NaN, and 0 x NaN is NaN, in the gradient too: there the
            # student is compared with itself.
            theirs_ND = theirs_ND.where(teacher.valid_N[:, None], hidden_ND.detach())
        return (hidden_ND - theirs_ND).square().sum(-1) / theirs_ND.square().sum(-1).clamp_min(1e-12)
