"""What a teacher said of a batch's documents, as tensors: a row for each position that counts. Called by `micro_batch`.

The teacher's row t of a document is its distribution of token t+1, and so is the counted position t of the batch: rows
are given in the order of the counted positions, by row and then by column. Which of the student's rows learns from one
is for the student to say, in its views.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import TEMPERED
from student_trainer.batch.teacher_rows import TeacherAttention, TeacherHead, TeacherRows
from student_trainer.batch.tensors import own_tensor
from student_trainer.batch.view import View
from teacher_proto.attention_targets import PARTS, AttentionTargets
from teacher_proto.errors import InvalidTargetsError
from teacher_proto.relations import QKV
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets


def teacher_rows(
    batch: Batch, answers: Sequence[TokenTargets | None], spec: TargetSpec, head: TeacherHead | None
) -> TeacherRows | None:
    """Rows of the batch's counted positions, in their order; documents come in that order. None where there are none.

    InvalidTargetsError for a number that is not finite where it would be learnt from.
    """
    pieces: dict[str, list[np.ndarray]] = {}
    for document, answer in zip(batch.documents, answers, strict=True):
        if answer is None:
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
    tensors = {_FIELDS[name]: own_tensor(array, _DTYPES.get(name)) for name, array in arrays.items()}
    return TeacherRows(
        **tensors, temperatures=spec.temperatures, sampled_temperature=spec.sample_temperature, teacher_head=head
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


def teacher_attention(states: Sequence[AttentionTargets], view: View) -> TeacherAttention:
    """States of each of the batch's documents, for the positions of the view that hold their tokens as they are."""
    return TeacherAttention(tuple(map(_states, states)), view.attention.clean_documents_BT.numpy())


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
