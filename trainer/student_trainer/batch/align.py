"""A batch and its targets as tensors, every teacher row beside the student's row that it teaches. Called by `prefetch`.

The teacher's row t of a document is its distribution of token t+1. Which of the student's rows that belongs to is the
student's `teacher_shift` (science: the alignment of autoregressive and diffusion students):

    teacher_shift  0: the student's row t predicts token t+1, and takes the teacher's row t
    teacher_shift -1: the student's row t predicts token t,   and takes the teacher's row t-1

So label and teacher row always go together; the shift only says which hidden row they meet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import TEMPERED, BatchTargets
from student_trainer.batch.teacher_rows import TeacherAttention, TeacherHead, TeacherRows
from teacher_proto.attention_targets import PARTS, AttentionTargets
from teacher_proto.errors import InvalidTargetsError
from teacher_proto.relations import QKV
from teacher_proto.targets import TokenTargets


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some rows of a batch on the device: what one forward and backward pass needs.

    N counts the labels. `rows_N` places each in the flattened [B x T] hidden rows; `sources_N` indexes the batch's
    `source_names`; `teacher` has a row for each label, `attention` an item for each document.
    """

    tokens_BT: Tensor  # int64
    position_ids_BT: Tensor  # int64
    document_ids_BT: Tensor  # int32, -1 is padding
    rows_N: Tensor  # int64
    labels_N: Tensor  # int64
    sources_N: Tensor  # int64
    teacher: TeacherRows | None
    first_row: int = 0  # of the batch
    attention: TeacherAttention | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; from pinned memory without waiting for the copy."""
        if device.type == "cpu":
            return self
        moved = {name: _pinned(getattr(self, name)).to(device, non_blocking=True) for name in _TENSORS}
        teacher = None
        if self.teacher is not None:
            pinned = {name: _pinned(value) for name, value in vars(self.teacher).items() if isinstance(value, Tensor)}
            teacher = replace(self.teacher, **pinned).to(device)
        attention = None if self.attention is None else self.attention.to(device)
        return replace(self, **moved, teacher=teacher, attention=attention)


_TENSORS = ("tokens_BT", "position_ids_BT", "document_ids_BT", "rows_N", "labels_N", "sources_N")


def micro_batches(
    batch: Batch, targets: BatchTargets | None, *, rows: int | None = None, teacher_shift: int = 0,
    head: TeacherHead | None = None, keep_empty: bool = False,
) -> tuple[MicroBatch, ...]:  # fmt: skip
    """The batch cut into micro batches of at most `rows` rows, on the CPU. Those without any label are left out, if
    not `keep_empty`: ranks that gather parameters together must all make as many passes.

    `head` is the teacher's, already on its device, for targets of kind `hidden`.
    """
    assert teacher_shift in (0, -1), teacher_shift
    size = rows or len(batch.tokens_BT)
    parts = []
    for first in range(0, len(batch.tokens_BT), size):
        part = _one(batch, targets, first, min(first + size, len(batch.tokens_BT)), teacher_shift, head)
        if keep_empty or len(part.labels_N):
            parts.append(part)
    return tuple(parts)


def _one(
    batch: Batch, targets: BatchTargets | None, first: int, stop: int, teacher_shift: int, head: TeacherHead | None
) -> MicroBatch:
    width = batch.tokens_BT.shape[1]
    # Row t of the batch predicts token t+1 where the mask is set.
    row_N, column_N = np.nonzero(batch.loss_mask_BT[first:stop])
    rows_N = row_N * width + column_N - teacher_shift
    attention = None
    if targets is not None and targets.attention is not None:
        attention = _teacher_attention(batch, targets.attention, first, stop, rows_N)
    return MicroBatch(
        tokens_BT=_tensor(batch.tokens_BT[first:stop], torch.int64),
        position_ids_BT=_tensor(batch.position_ids_BT[first:stop], torch.int64),
        document_ids_BT=_tensor(batch.document_ids_BT[first:stop], torch.int32),
        rows_N=_tensor(rows_N, torch.int64),
        labels_N=_tensor(batch.tokens_BT[first:stop][row_N, column_N + 1], torch.int64),
        sources_N=_tensor(batch.source_ids_BT[first:stop][row_N, column_N], torch.int64),
        teacher=_teacher_rows(batch, targets, first, stop, head) if targets is not None and targets.ask.kinds else None,
        first_row=first,
        attention=attention,
    )


def _teacher_rows(
    batch: Batch, targets: BatchTargets, first: int, stop: int, head: TeacherHead | None
) -> TeacherRows | None:
    """Rows in the order of the labels: by row of the batch, then by position; documents come in that order. None
    where there are none.

    InvalidTargetsError for a number that is not finite where it would be learnt from.
    """
    pieces: dict[str, list[np.ndarray]] = {}
    for document, answer in zip(batch.documents, targets.documents, strict=True):
        if not first <= document.row < stop or answer is None:
            continue
        mask_T = batch.loss_mask_BT[document.row, document.start : document.stop]
        counted_R = mask_T[answer.start : answer.start + answer.num_rows]
        assert counted_R.sum() == mask_T.sum(), "a row that counts was not asked for"
        for name, array in _counted(answer, counted_R).items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InvalidTargetsError(f"{name} of document {document.key} is not finite on a row that counts")
            pieces.setdefault(name, []).append(array)
    if not pieces:
        return None
    arrays = {name: np.concatenate(parts) for name, parts in pieces.items()}
    if "sampled_lengths" in arrays:
        arrays["sampled_offsets"] = np.concatenate([[0], np.cumsum(arrays.pop("sampled_lengths"))])
    if "hidden" not in arrays:
        head = None
    tensors = {_FIELDS[name]: _tensor(array, _DTYPES.get(name)) for name, array in arrays.items()}
    ask = targets.ask
    return TeacherRows(
        **tensors, temperatures=ask.temperatures, sampled_temperature=ask.sample_temperature, teacher_head=head
    )


def _counted(answer: TokenTargets, counted_R: np.ndarray) -> dict[str, np.ndarray]:
    """The rows that count of every tensor; of samples, which are ragged, how many each row has instead of offsets."""
    arrays = answer.tensors()
    if answer.hidden is not None:
        arrays["hidden"] = hidden_numbers(answer.hidden, arrays.pop("hidden_scale", None))
    ragged = {}
    if answer.sampled_offsets is not None:
        lengths_R = np.diff(arrays.pop("sampled_offsets"))
        drawn_M = np.repeat(counted_R, lengths_R)
        ragged = {name: arrays.pop(name)[drawn_M] for name in ("sampled_ids", "sampled_counts")}
        ragged["sampled_lengths"] = lengths_R[counted_R]
    whole = bool(counted_R.all())
    return ragged | {name: array if whole else array[counted_R] for name, array in arrays.items() if name in _FIELDS}


def hidden_numbers(hidden_RD: np.ndarray, scale_R: np.ndarray | None) -> np.ndarray:
    """Hidden states as floats: fp16 as it is, bf16 (which comes as its bits) and scaled int8 as fp32."""
    if scale_R is not None:
        return hidden_RD.astype(np.float32) * scale_R[:, None]
    if hidden_RD.dtype == np.uint16:
        return (hidden_RD.astype(np.uint32) << 16).view(np.float32)
    return hidden_RD


def _teacher_attention(
    batch: Batch, attention: tuple[AttentionTargets, ...], first: int, stop: int, rows_N: np.ndarray
) -> TeacherAttention:
    """What the teacher says of the batch's rows [first, stop); `rows_N` places each label in their flattened rows."""
    document_ids_BT = batch.document_ids_BT[first:stop]
    chosen = [index for index, document in enumerate(batch.documents) if first <= document.row < stop]
    place_BT = np.full(document_ids_BT.shape, -1)
    for place, index in enumerate(chosen):
        document = batch.documents[index]
        place_BT[document.row - first, document.start : document.stop] = place
    return TeacherAttention(
        documents=tuple(_states(attention[index]) for index in chosen),
        document_ids_BT=document_ids_BT,
        document_N=torch.from_numpy(place_BT.reshape(-1)[rows_N]),
    )


def _states(targets: AttentionTargets) -> QKV:
    """fp16 as it came, int8 multiplied out; in memory of their own."""
    arrays = targets.tensors() if targets.query_scale is None else targets.states()
    return QKV(*(torch.from_numpy(np.array(arrays[part])) for part in PARTS))


# Tensors of a record and the fields that they become; ids are two bytes on the wire, which torch cannot index with.
_FIELDS = {
    "ids": "ids_NK",
    "logprobs": "logprobs_NK",
    "lse": "lse_N",
    "next_logprob": "next_logprob_N",
    "log_z": "log_z_NT",
    TEMPERED: "tempered_logprobs_NKT",
    "sampled_offsets": "sampled_offsets",
    "sampled_ids": "sampled_ids",
    "sampled_counts": "sampled_counts",
    "hidden": "teacher_hidden_NE",
}
_DTYPES = {"ids": torch.int32, "sampled_ids": torch.int32, "sampled_offsets": torch.int64}


def _tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of its own memory: what numpy views belongs to a response, and may not be written to."""
    wide = array.astype(np.int32) if array.dtype == np.uint16 else np.array(array)
    tensor = torch.from_numpy(wide)
    return tensor if dtype is None else tensor.to(dtype)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory()
