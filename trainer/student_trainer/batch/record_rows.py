"""Turns a teacher's responses into `TeacherRows`, by concatenating their tensors. Called by `align`, which takes the
rows that count, and by third-party trainers, whose student has a row for each row of the responses (`teacher_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from student_trainer.batch.batch_targets import TEMPERED
from student_trainer.batch.head import Head
from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.batch.tensors import own_tensor
from teacher_proto.targets import TokenTargets

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


def teacher_rows(
    answers: Sequence[TokenTargets], temperatures: Sequence[float] = (), *, sample_temperature: float = 1.0,
    head: Head | None = None,
) -> TeacherRows:  # fmt: skip
    """All rows of all responses, in order. `temperatures`, `sample_temperature`: as requested; `head`: the teacher's,
    for responses of kind `hidden`. ValueError for no responses, or for responses to different requests.

    The last row of a sequence predicts what would follow it: it has no label, and its `next_logprob` is NaN.
    """
    pieces: dict[str, list[np.ndarray]] = {}
    for answer in answers:
        for name, array in arrays_of(answer, np.ones(answer.num_rows, bool)).items():
            pieces.setdefault(name, []).append(array)
    if not pieces or any(len(parts) != len(answers) for parts in pieces.values()):
        raise ValueError(
            f"got {len(answers)} responses with {sorted(pieces)}, expected one or more, all with the same tensors"
        )
    if "log_z" in pieces and len(temperatures) != pieces["log_z"][0].shape[1]:
        raise ValueError(
            f"got temperatures {list(temperatures)}, but the responses have log_z at {pieces['log_z'][0].shape[1]}: "
            "pass the requested ones"
        )
    return rows_of(pieces, tuple(temperatures), sample_temperature, head)


def rows_of(
    pieces: Mapping[str, Sequence[np.ndarray]], temperatures: tuple[float, ...], sample_temperature: float,
    head: Head | None,
) -> TeacherRows:  # fmt: skip
    """The tensors of several responses concatenated; `pieces`: by the name of the record's tensor, from `arrays_of`."""
    arrays = {name: np.concatenate(parts) for name, parts in pieces.items()}
    if "sampled_lengths" in arrays:
        # The offsets of the concatenation are the cumulative sum of the rows' lengths.
        arrays["sampled_offsets"] = np.concatenate([[0], np.cumsum(arrays.pop("sampled_lengths"))])
    if "hidden" not in arrays:
        head = None
    tensors = {_FIELDS[name]: own_tensor(array, _DTYPES.get(name)) for name, array in arrays.items()}
    return TeacherRows(**tensors, temperatures=temperatures, sampled_temperature=sample_temperature, teacher_head=head)


def arrays_of(answer: TokenTargets, counted_R: np.ndarray) -> dict[str, np.ndarray]:
    """Of every tensor, the rows that count; samples are ragged, and come with the rows' lengths instead of offsets."""
    arrays = answer.tensors()
    if answer.hidden is not None:
        arrays["hidden"] = hidden_numbers(answer.hidden, arrays.pop("hidden_scale", None))
    ragged = {}
    if answer.sampled_offsets is not None:
        lengths_R = np.diff(arrays.pop("sampled_offsets"))
        # Draws are stored row after row: each has the flag of its row.
        drawn_M = np.repeat(counted_R, lengths_R)
        ragged = {name: arrays.pop(name)[drawn_M] for name in ("sampled_ids", "sampled_counts")}
        ragged["sampled_lengths"] = lengths_R[counted_R]
    whole = bool(counted_R.all())
    return ragged | {name: array if whole else array[counted_R] for name, array in arrays.items() if name in _FIELDS}


def hidden_numbers(hidden_RD: np.ndarray, scale_R: np.ndarray | None) -> np.ndarray:
    """Hidden states as floats: fp16 as it is, bf16 (received as raw bits) and scaled int8 as fp32."""
    if scale_R is not None:
        return hidden_RD.astype(np.float32) * scale_R[:, None]
    if hidden_RD.dtype == np.uint16:
        # A bfloat16 is the upper half of a float32.
        return (hidden_RD.astype(np.uint32) << 16).view(np.float32)
    return hidden_RD
