"""A batch cut into what one forward and backward pass needs, every label with its teacher's row. The one way in.

    cut(batch, targets, reader, seed, rows=4)

Called by all who show a batch to a student: `prefetch` for a step, the evaluation for held-out rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.batch.align import teacher_attention, teacher_rows
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.teacher_rows import TeacherAttention, TeacherHead, TeacherRows
from student_trainer.batch.tensors import to_device
from student_trainer.batch.view import Reader, View, ViewSeed


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A view of the batch's rows [first_row, first_row + rows), for one forward and backward pass.

    Of each of the view's N labels: `sources_N` indexes the batch's `source_names`, `documents_N` the documents of these
    rows, by row and then by start; `teacher` has a row for each. `attention` has an item for each document.
    """

    view: View
    sources_N: Tensor  # int64
    documents_N: Tensor  # int64
    teacher: TeacherRows | None
    first_row: int = 0
    rows: int = 0
    attention: TeacherAttention | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; from pinned memory without waiting for the copy."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        attention = None if self.attention is None else self.attention.to(device)
        return to_device(self, device, view=self.view.to(device), teacher=teacher, attention=attention)


def cut(
    batch: Batch, targets: BatchTargets | None, reader: Reader, seed: ViewSeed, *, rows: int | None = None,
    head: TeacherHead | None = None, keep_empty: bool = False,
) -> tuple[MicroBatch, ...]:  # fmt: skip
    """The batch's views, of at most `rows` rows each, on the CPU. Those that add nothing to the count of labels are
    left out, if not `keep_empty`: ranks that gather parameters together must all make as many passes.

    `head` is the teacher's, already on its device, for targets of kind `hidden`.
    InvalidTargetsError for a number of the teacher's that is not finite where it would be learnt from.
    """
    size = rows or len(batch.tokens_BT)
    parts: list[MicroBatch] = []
    for first in range(0, len(batch.tokens_BT), size):
        stop = min(first + size, len(batch.tokens_BT))
        parts += _micro_batches(
            batch.rows(first, stop), targets, reader, seed, first, _between(batch, first, stop), head
        )
    return tuple(part for part in parts if keep_empty or part.view.count)


def _between(batch: Batch, first: int, stop: int) -> slice:
    """Where the documents of the rows [first, stop) stand among those of the batch, which come by row."""
    rows_M = [document.row for document in batch.documents]
    return slice(int(np.searchsorted(rows_M, first)), int(np.searchsorted(rows_M, stop)))


def _micro_batches(
    part: Batch, targets: BatchTargets | None, reader: Reader, seed: ViewSeed, first_row: int, documents: slice,
    head: TeacherHead | None,
) -> list[MicroBatch]:  # fmt: skip
    """The views of some rows, each with what belongs to its labels; `documents`: theirs among those of `targets`."""
    row_C, column_C = part.counted()
    sources_C = torch.from_numpy(part.source_ids_BT[row_C, column_C].astype(np.int64))
    documents_C = torch.from_numpy(_document_of_each(part, row_C, column_C))
    teacher_C, states = None, None
    if targets is not None:
        if targets.spec.kinds:
            teacher_C = teacher_rows(part, targets.documents[documents], targets.spec, head)
        if targets.attention is not None:
            states = targets.attention[documents]
    made = []
    for view in reader.views(part, seed):
        # Every counted position in its order is the common case, and nothing is copied for it.
        in_order = torch.equal(view.counted_N, torch.arange(len(row_C)))
        documents_N = documents_C if in_order else documents_C[view.counted_N]
        teacher = teacher_C
        if teacher is not None and not in_order:
            teacher = teacher.select(view.counted_N) if len(documents_N) else None
        made.append(
            MicroBatch(
                view=view,
                sources_N=sources_C if in_order else sources_C[view.counted_N],
                documents_N=documents_N,
                teacher=teacher,
                first_row=first_row,
                rows=len(part.tokens_BT),
                attention=None if states is None else teacher_attention(states, view),
            )
        )
    return made


def _document_of_each(part: Batch, row_C: np.ndarray, column_C: np.ndarray) -> np.ndarray:
    """[C] int64: the place among `part.documents` of each counted position's document."""
    place_BT = np.full(part.tokens_BT.shape, -1, np.int64)
    for place, document in enumerate(part.documents):
        place_BT[document.row, document.start : document.stop] = place
    return place_BT[row_C, column_C]
