"""The input of one forward and backward pass: a view of some rows of a batch, every label with its teacher row.

Made by `align`, read by students, losses and evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.batch.teacher_rows import TeacherAttention, TeacherRows
from student_trainer.batch.tensors import to_device
from student_trainer.batch.view import View


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A view of the batch's rows [first_row, first_row + rows), for one forward and backward pass.

    For each of the view's N labels, `sources_N` indexes the batch's `source_names`, `documents_N` the documents of
    these rows, by row and then by start, and `teacher` has a row. `attention` has an item for each document.
    """

    view: View
    sources_N: Tensor  # int64
    documents_N: Tensor  # int64
    teacher: TeacherRows | None
    first_row: int = 0
    rows: int = 0
    attention: TeacherAttention | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; copied to a GPU from pinned memory, without waiting."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        attention = None if self.attention is None else self.attention.to(device)
        return to_device(self, device, view=self.view.to(device), teacher=teacher, attention=attention)
