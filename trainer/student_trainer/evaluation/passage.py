"""A held-out text with teacher's and student's predictions for each token. Called by `evaluator`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.view import ViewSeed
from student_trainer.students.student import Student

TOKENS = 256
GUESSES = 5


def make_passage(
    student: Student, batch: Batch, targets: BatchTargets | None, decode: Callable[[int], str], seed: ViewSeed
) -> list[dict[str, Any]]:
    """`[{"text", "teacher": [[token, probability], ...], "student": ...}, ...]` for the batch's first document.

    The guesses of an entry are predictions of this token; the first token has none.
    """
    if not can_be_shown(targets):
        return []
    assert targets is not None
    document, answer = batch.documents[0], targets.documents[0]
    assert answer is not None and answer.ids is not None
    length = min(document.stop - document.start, TOKENS)
    tokens_T = batch.tokens_BT[document.row, document.start : document.start + length]
    guesses = _student_guesses(student, batch.rows(document.row, document.row + 1), length, decode, seed)
    probabilities_RK = answer.probabilities()
    passage = []
    for place, token in enumerate(tokens_T):
        row = place - 1 - answer.start
        entry: dict[str, Any] = {"text": decode(int(token)), "teacher": [], "student": []}
        if 0 <= row < answer.num_rows and place - 1 in guesses:
            ids_K, p_K = answer.ids[row, :GUESSES], probabilities_RK[row, :GUESSES]
            entry["teacher"] = [[decode(int(i)), round(float(p), 4)] for i, p in zip(ids_K, p_K, strict=True)]
            entry["student"] = guesses[place - 1]
        passage.append(entry)
    return passage


def can_be_shown(targets: BatchTargets | None) -> bool:
    """Whether the batch's first document has top-K targets; if so, making a passage takes one pass of the student."""
    answer = targets.documents[0] if targets is not None and targets.documents else None
    return answer is not None and answer.ids is not None


def _student_guesses(
    student: Student, row: Batch, length: int, decode: Callable[[int], str], seed: ViewSeed
) -> dict[int, list[list[Any]]]:
    """The student's likeliest tokens after position t of the row's first document, by t."""
    first = row.documents[0]
    mask_BT = np.zeros_like(row.loss_mask_BT)
    mask_BT[0, first.start : first.start + length] = row.loss_mask_BT[0, first.start : first.start + length]
    alone = replace(row, loss_mask_BT=mask_BT)
    places = np.flatnonzero(mask_BT[0]) - first.start
    guesses: dict[int, list[list[Any]]] = {}
    for micro in cut(alone, None, student, seed, keep_empty=True):
        p_NV = torch.softmax(student.logits(micro.to(student.device)), -1)
        top = p_NV.topk(GUESSES)
        for place, p_K, ids_K in zip(
            places[micro.view.counted_N.numpy()], top.values.tolist(), top.indices.tolist(), strict=True
        ):
            guesses[int(place)] = [[decode(i), round(p, 4)] for i, p in zip(ids_K, p_K, strict=True)]
    return guesses
