"""The teacher's logprobs at the student's own likeliest ids, or at the class words, for losses with support `gather`.
Called by `late`.

The student's likeliest ids depend on its weights, so they are known only after the previous update and cannot be
requested ahead of time. They are computed from the weights at the start of the step, in an extra forward pass without
dropout, and requested between two updates for all micro batches at once. A step thus costs one more forward pass
without gradient and one more round trip. The targets depend only on batch and weights, so a resumed run gets the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.batch.batch import Batch, counted_rows
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.losses.chunks import default_chunk_rows
from student_trainer.losses.projection import HeadProjection
from student_trainer.students.student import Student
from student_trainer.targets.background import EventThread
from student_trainer.targets.prefetch import POLL_S, Ready
from student_trainer.targets.protocol import Queries, Targets
from student_trainer.targets.queries import queries_of
from teacher_proto.requests import TargetSpec

SPEC = TargetSpec(("gather",))


class StudentSupport:
    """Requests logprobs at the student's `k` likeliest ids of every counted row, or at `words` if given."""

    def __init__(self, targets: Targets, thread: EventThread, k: int, words: Sequence[int] = ()):
        self._targets, self._thread, self._k, self._words = targets, thread, k, words

    def add(self, student: Student, ready: Ready, while_waiting: Callable[[float], None]) -> Ready:
        """The batch with `gather_*` added to its other targets. `while_waiting` as in `Prefetch.next`."""
        # With several ranks, a micro batch may have no label on this one.
        counting = [micro for micro in ready.micro if len(micro.view.labels_N)]
        parts = [ready.batch.rows(micro.first_row, micro.first_row + micro.rows) for micro in counting]
        ids = [self._ids(student, micro) for micro in counting]
        placed = [
            ids_by_position(micro, ids_NG, part) for micro, ids_NG, part in zip(counting, ids, parts, strict=True)
        ]
        calls = [
            self._targets.fetch(part, queries_at(part, ids_CG)) for part, ids_CG in zip(parts, placed, strict=True)
        ]
        answers, waited_s = answered(self._thread, calls, while_waiting)
        gathered = iter(map(_with_gathered, counting, ids, parts, answers))
        micro = tuple(next(gathered) if len(each.view.labels_N) else each for each in ready.micro)
        return replace(ready, micro=micro, waited_s=ready.waited_s + waited_s)

    def _ids(self, student: Student, micro: MicroBatch) -> Tensor:
        if self._words:
            return torch.tensor(self._words, device=student.device).expand(len(micro.view.labels_N), -1)
        return likeliest(student, micro, self._k)


def likeliest(student: Student, micro: MicroBatch, k: int) -> Tensor:
    """The student's k likeliest ids for each label [N, k], from a forward pass without dropout."""
    head = student.head
    with student.resting():
        return student_top_ids(
            student.hidden(micro), head.weight_VD, k,
            head_bias_V=head.bias_V, shared_vocab=student.shared_vocab, compute=student.compute,
        )  # fmt: skip


def answered(
    thread: EventThread, calls: Sequence[Coroutine[Any, Any, BatchTargets]], while_waiting: Callable[[float], None]
) -> tuple[list[BatchTargets], float]:
    """Run all calls concurrently; return their results and the seconds that took. `while_waiting` is called meanwhile
    with the seconds so far.
    """
    asked = time.monotonic()
    futures = [thread.submit(call) for call in calls]
    try:
        while wait(futures, timeout=POLL_S).not_done:
            while_waiting(time.monotonic() - asked)
        return [future.result() for future in futures], time.monotonic() - asked
    finally:
        for future in futures:
            future.cancel()


def ids_by_position(micro: MicroBatch, ids_NG: Tensor, part: Batch) -> np.ndarray:
    """The labels' ids by counted position [C, S * G]; positions without a label in the view get id 0.

    S is the largest number of labels at one position: 1 unless a view reads a position in several ways.
    """
    counted_N, slot_N = slots_of(micro)
    shape = int(part.loss_mask_BT.sum()), int(slot_N.max()) + 1, ids_NG.shape[1]
    ids_CSG = np.zeros(shape, np.int64)
    ids_CSG[counted_N, slot_N] = ids_NG.cpu().numpy()
    return ids_CSG.reshape(len(ids_CSG), -1)


def slots_of(micro: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """For each label, its counted position and the number of earlier labels at the same position."""
    counted_N = micro.view.counted_N.numpy()
    order_N = np.argsort(counted_N, kind="stable")
    sorted_N = counted_N[order_N]
    slot_N = np.empty_like(counted_N)
    # The index in the sorted order minus that of the first equal one: 0 for a position's first label, 1 for its next.
    slot_N[order_N] = np.arange(len(counted_N)) - np.searchsorted(sorted_N, sorted_N)
    return counted_N, slot_N


def queries_at(part: Batch, ids_CG: np.ndarray) -> Queries:
    """Queries for the ids of the counted positions; uncounted rows in between get id 0."""
    asked = []
    first = 0
    for document in part.documents:
        rows = counted_rows(part, document) or (0, 0)
        counted_R = part.loss_mask_BT[document.row, document.start + rows[0] : document.start + rows[1]]
        ids_RG = np.zeros((len(counted_R), ids_CG.shape[1]), ids_CG.dtype)
        ids_RG[counted_R] = ids_CG[first : first + counted_R.sum()]
        first += int(counted_R.sum())
        asked.append(ids_RG)
    assert first == len(ids_CG), (first, len(ids_CG))
    return queries_of(part, SPEC, asked)


def _with_gathered(micro: MicroBatch, ids_NG: Tensor, part: Batch, answer: BatchTargets) -> MicroBatch:
    logprobs = []
    for document, targets in zip(part.documents, answer.documents, strict=True):
        if targets is not None and targets.gather_logprobs is not None:
            start = document.start + targets.start
            counted_R = part.loss_mask_BT[document.row, start : start + targets.num_rows]
            logprobs.append(targets.gather_logprobs[counted_R])
    assert micro.teacher is not None
    logprobs_CG = np.concatenate(logprobs)
    logprobs_CSG = logprobs_CG.reshape(len(logprobs_CG), -1, ids_NG.shape[1])
    logprobs_NG = torch.from_numpy(logprobs_CSG[slots_of(micro)]).to(ids_NG.device)
    return replace(micro, teacher=replace(micro.teacher, gather_ids_NG=ids_NG, gather_logprobs_NG=logprobs_NG))


@torch.no_grad()
def student_top_ids(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    k: int,
    *,
    head_bias_V: Tensor | None = None,
    shared_vocab: int | None = None,
    chunk_rows: int | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Ids [N, k] (int64) of the student's k largest logits, largest first, among the first `shared_vocab` ids.

    `compute`: the student's compute dtype, see `projection`. Soft cap and scale are not needed, since they keep the
    order of logits. ValueError if k is below 1 or exceeds the number of ids.
    """
    width = len(head_weight_VD) if shared_vocab is None else shared_vocab
    if not 0 < k <= width:
        raise ValueError(f"got k {k}, expected 1 to {width}")
    bias_W = None if head_bias_V is None else head_bias_V[:width]
    # Without cap and scale: both keep the order of logits.
    head = HeadProjection(head_weight_VD[:width], bias_W, None, 1.0, hidden_ND.dtype, compute)
    height = min(chunk_rows or default_chunk_rows(width, hidden_ND.device), max(1, len(hidden_ND)))
    # A buffer for one chunk of logits, reused by the next.
    z_CW = torch.empty(height, width, dtype=head.accumulator, device=hidden_ND.device)
    ids_NK = torch.empty(len(hidden_ND), k, dtype=torch.long, device=hidden_ND.device)
    for start in range(0, len(hidden_ND), height):
        hidden_CD = hidden_ND[start : start + height].to(head.dtype)
        head.project(hidden_CD, z_CW[: len(hidden_CD)])
        head.cap_(z_CW[: len(hidden_CD)])
        ids_NK[start : start + height] = z_CW[: len(hidden_CD)].topk(k, -1).indices
    return ids_NK
