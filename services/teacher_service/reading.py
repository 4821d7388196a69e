"""From what an engine computed to the record it answers with: packed rows read and checked.

Used by the engines that reduce logits themselves (vLLM, transformers); `service.py` has every answer checked.
"""

from __future__ import annotations

import numpy as np

from serving.engine import Job
from teacher_proto.errors import EngineError
from teacher_proto.requests import Query
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.packed import RowLayout, unpack_rows


def read_rows(packed_RB: np.ndarray, job: Job[Query], layout: RowLayout) -> TokenTargets:
    """The record of a job's packed rows. EngineError if rows are missing or a number is not finite.

    NaN spreads through a sequence's attention, so the first bad row is named for orientation, not as the culprit.
    """
    query = job.query
    start, stop = query.rows
    if packed_RB.shape != (stop - start, layout.row_bytes):
        raise EngineError(
            f"{job.request_id}: the engine answered {list(packed_RB.shape)} bytes for rows [{start}, {stop}) of "
            f"{layout.row_bytes} bytes",
            request_id=job.request_id,
            retryable=True,
        )
    targets = unpack_rows(packed_RB, start, layout)
    for name in ("lse", "next_logprob", "log_z"):
        column = getattr(targets, name)
        if column is None:
            continue
        bad_R = ~np.isfinite(column.reshape(stop - start, -1)).all(axis=1)
        if name == "next_logprob" and stop == query.num_tokens:
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


def check_sound(query: Query, targets: TokenTargets) -> None:
    """Refuse what a broken model computes: NaN and infinity reach `lse` or `next_logprob` of their row.

    EngineError, not retryable. The client checks the whole record; this is cheap enough for every answer.
    """
    if targets.start != query.rows[0] or targets.num_rows != query.rows[1] - query.rows[0]:
        raise EngineError(f"the engine answered {targets.num_rows} rows from {targets.start}, not {query.rows}")
    scored_R = targets.lse if targets.lse is not None else targets.next_logprob
    if scored_R is None:
        return
    finite_R = np.isfinite(scored_R)
    if targets.lse is None and query.rows[1] == query.num_tokens:
        finite_R = finite_R[:-1]
    if not finite_R.all():
        row = int(np.flatnonzero(~finite_R)[0]) + targets.start
        raise EngineError(f"the teacher computed NaN or infinity at row {row} of this sequence", retryable=False)
