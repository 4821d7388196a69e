"""The protocol between the teacher service and its engines (vLLM, transformers, scripted), and the check of targets.

What an engine computed is checked here, once, as it becomes a record. The service sees nothing else of an engine;
`run.py` picks one by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from serving.engine import AnyEngine, Job
from teacher_proto.errors import EngineError
from teacher_proto.requests import Kind, Limits, Query
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.packed import RowLayout, unpack_rows

if TYPE_CHECKING:
    from teacher_service.head_file import HeadFile


class Engine(AnyEngine, Protocol):
    """Scores sequences, urgent ones first. `kinds` is known once `start` has returned."""

    limits: Limits
    kinds: tuple[Kind, ...]

    async def score(self, job: Job[Query]) -> TokenTargets:
        """The targets of a job that has passed `check_request`, themselves passed by `checked`. EngineError if the job
        failed, EngineDeadError if the engine is dead."""
        ...

    def head(self) -> HeadFile:
        """The output head, read as it is sent. Called only if `hidden` is in `kinds`."""
        ...


def read_rows(packed_RB: np.ndarray, job: Job[Query], layout: RowLayout) -> TokenTargets:
    """The checked record of a job's packed rows. EngineError if rows are missing, or `checked` raises it."""
    start, stop = job.query.rows
    if packed_RB.shape != (stop - start, layout.row_bytes):
        raise EngineError(
            f"{job.request_id}: the engine returned bytes of shape {list(packed_RB.shape)} for rows [{start}, {stop}) "
            f"of {layout.row_bytes} bytes each",
            request_id=job.request_id,
            retryable=True,
        )
    return checked(unpack_rows(packed_RB, start, layout), job)


def checked(targets: TokenTargets, job: Job[Query]) -> TokenTargets:
    """Returns the targets, unless only a broken model computes such: EngineError for a wrong number of rows or a number
    that is not finite. The client checks the whole record; this is cheap enough for every job.

    NaN spreads through a sequence's attention, so the first bad row is named for orientation, not as the culprit.
    """
    start, stop = job.query.rows
    if targets.start != start or targets.num_rows != stop - start:
        raise EngineError(
            f"the engine returned {targets.num_rows} rows from {targets.start}, expected [{start}, {stop})",
            request_id=job.request_id,
        )
    for name in ("lse", "next_logprob", "log_z"):
        column = getattr(targets, name)
        if column is None:
            continue
        bad_R = ~np.isfinite(column.reshape(stop - start, -1)).all(axis=1)
        if name == "next_logprob" and stop == job.query.num_tokens:
            bad_R[-1] = False  # the last row has no next token
        if bad_R.any():
            row = start + int(bad_R.argmax())
            raise EngineError(
                f"the teacher computed a {name} that is not finite, first at position {row}: its weights or its "
                "arithmetic overflow on this sequence",
                field=name,
                got=row,
                request_id=job.request_id,
            )
    return targets
