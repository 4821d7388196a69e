"""What a teacher engine is to the service: one protocol, three engines behind it (vLLM, transformers, scripted).

What an engine computed is checked here, once, as it becomes the record that it answers with.

The service sees nothing else of an engine; `run.py` picks one by name.
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
    """Scores sequences, urgent ones first. `kinds` are known once `start` has returned."""

    limits: Limits
    kinds: tuple[Kind, ...]

    async def score(self, job: Job[Query]) -> TokenTargets:
        """The targets of a job that `check_request` has passed, as `checked` gives them on. EngineError, or
        EngineDeadError if none can come."""
        ...

    def head(self) -> HeadFile:
        """The output head, read as it is sent. Asked for only where `hidden` is in `kinds`."""
        ...


def read_rows(packed_RB: np.ndarray, job: Job[Query], layout: RowLayout) -> TokenTargets:
    """The checked record of a job's packed rows. EngineError if rows are missing, and as `checked`."""
    start, stop = job.query.rows
    if packed_RB.shape != (stop - start, layout.row_bytes):
        raise EngineError(
            f"{job.request_id}: the engine answered {list(packed_RB.shape)} bytes for rows [{start}, {stop}) of "
            f"{layout.row_bytes} bytes",
            request_id=job.request_id,
            retryable=True,
        )
    return checked(unpack_rows(packed_RB, start, layout), job)


def checked(targets: TokenTargets, job: Job[Query]) -> TokenTargets:
    """These targets, unless only a broken model computes them: EngineError for another number of rows, or one that is
    not finite. The client checks the whole record; this is cheap enough for every answer.

    NaN spreads through a sequence's attention, so the first bad row is named for orientation, not as the culprit.
    """
    start, stop = job.query.rows
    if targets.start != start or targets.num_rows != stop - start:
        raise EngineError(
            f"the engine answered {targets.num_rows} rows from {targets.start}, not [{start}, {stop})",
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
                "arithmetic overflow at this sequence",
                field=name,
                got=row,
                request_id=job.request_id,
            )
    return targets
