"""Cuts a batch into micro batches, every label with its teacher row: the only way to show a batch to a student.

    cut(batch, targets, student, seed, rows=4)

Called for each step through `prefetch`, and by the evaluation. The teacher's row t of a document is its distribution of
token t+1, which is also what the batch's position t predicts. So teacher rows are built in the order of the counted
positions, by row and then by column, and a view's `counted_N` selects them. Which of the student's rows learns from
which teacher row is up to the student's views.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.head import Head
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.record_rows import arrays_of, rows_of
from student_trainer.batch.teacher_rows import TeacherAttention, TeacherRows
from student_trainer.batch.view import Reader, View, ViewSeed
from teacher_proto.attention_targets import PARTS, AttentionTargets
from teacher_proto.compute.relations import QKV
from teacher_proto.errors import InvalidTargetsError
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets


def cut(
    batch: Batch, targets: BatchTargets | None, reader: Reader, seed: ViewSeed, *, rows: int | None = None,
    head: Head | None = None, keep_empty: bool = False,
) -> tuple[MicroBatch, ...]:  # fmt: skip
    """The batch's views, of at most `rows` rows each, on the CPU. Those that add nothing to the count of labels are
    left out, unless `keep_empty`: ranks that gather parameters together must all make the same number of passes.

    `head` is the teacher's, already on its device, for targets of kind `hidden`.
    InvalidTargetsError if a number from the teacher is not finite on a row that counts.
    """
    size = rows or len(batch.tokens_BT)
    parts: list[MicroBatch] = []
    for first in range(0, len(batch.tokens_BT), size):
        stop = min(first + size, len(batch.tokens_BT))
        # A micro batch is a batch of fewer rows: its views, its documents, its teacher rows.
        parts += _micro_batches(
            batch.rows(first, stop), targets, reader, seed, first, _between(batch, first, stop), head
        )
    return tuple(part for part in parts if keep_empty or part.view.count)


def _between(batch: Batch, first: int, stop: int) -> slice:
    """The slice of the batch's documents, which are ordered by row, that lie in the rows [first, stop)."""
    rows_M = [document.row for document in batch.documents]
    return slice(int(np.searchsorted(rows_M, first)), int(np.searchsorted(rows_M, stop)))


def _micro_batches(
    part: Batch, targets: BatchTargets | None, reader: Reader, seed: ViewSeed, first_row: int, documents: slice,
    head: Head | None,
) -> list[MicroBatch]:  # fmt: skip
    """The views of some rows, each with what belongs to its labels; `documents`: the slice of `targets` for them."""
    row_C, column_C = part.counted()
    sources_C = torch.from_numpy(part.source_ids_BT[row_C, column_C].astype(np.int64))
    documents_C = torch.from_numpy(_document_of_each(part, row_C, column_C))
    teacher_C, states = None, None
    if targets is not None:
        if targets.spec.kinds:
            teacher_C = _teacher_rows(part, targets.documents[documents], targets.spec, head)
        if targets.attention is not None:
            states = targets.attention[documents]
    made = []
    for view in reader.views(part, seed):
        # In the common case labels are all counted positions in order, and nothing is copied.
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
                attention=None if states is None else _teacher_attention(states, view),
            )
        )
    return made


def _document_of_each(part: Batch, row_C: np.ndarray, column_C: np.ndarray) -> np.ndarray:
    """[C] int64: for each counted position, the index of its document in `part.documents`."""
    place_BT = np.full(part.tokens_BT.shape, -1, np.int64)
    for place, document in enumerate(part.documents):
        # Written out over the row and read at the counted positions: no search per position.
        place_BT[document.row, document.start : document.stop] = place
    return place_BT[row_C, column_C]


def _teacher_rows(
    batch: Batch, answers: Sequence[TokenTargets | None], spec: TargetSpec, head: Head | None
) -> TeacherRows | None:
    """The teacher rows of the batch's counted positions, in order, which is also that of documents; None if there are
    none.

    InvalidTargetsError if a number is not finite on a row that counts.
    """
    pieces: dict[str, list[np.ndarray]] = {}
    for document, answer in zip(batch.documents, answers, strict=True):
        if answer is None:
            continue
        mask_T = batch.loss_mask_BT[document.row, document.start : document.stop]
        # The targets begin at row `start` of the document; of their rows, those that count are taken, in order.
        counted_R = mask_T[answer.start : answer.start + answer.num_rows]
        assert counted_R.sum() == mask_T.sum(), "a row that counts was not requested"
        for name, array in arrays_of(answer, counted_R).items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InvalidTargetsError(f"{name} of document {document.key} is not finite on a row that counts")
            pieces.setdefault(name, []).append(array)
    return rows_of(pieces, spec.temperatures, spec.sample_temperature, head) if pieces else None


def _teacher_attention(states: Sequence[AttentionTargets], view: View) -> TeacherAttention:
    """The states of the batch's documents, for the positions of the view that hold their tokens unmasked."""
    blocks_BT = None if view.clean_blocks_BT is None else view.clean_blocks_BT.numpy()
    return TeacherAttention(tuple(map(_states, states)), view.attention.clean_documents_BT.numpy(), blocks_BT)


def _states(targets: AttentionTargets) -> QKV:
    """Query, key and value in their own memory: fp16 as received, int8 multiplied by its scales."""
    arrays = targets.tensors() if targets.query_scale is None else targets.states()
    return QKV(*(torch.from_numpy(np.array(arrays[part])) for part in PARTS))
