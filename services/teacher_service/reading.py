"""From what an engine computed to the record it answers with: packed rows read and checked.

Used by the engines that reduce logits themselves (vLLM, transformers).
"""

from __future__ import annotations

import numpy as np

from teacher_proto.errors import EngineError
from teacher_proto.packed import RowLayout, unpack_rows
from teacher_proto.targets import TokenTargets
from teacher_service.engine import Job


def read_rows(packed_RB: np.ndarray, job: Job, layout: RowLayout) -> TokenTargets:
    """The record of a job's packed rows. EngineError if rows are missing or a number is not finite.

    NaN spreads through a sequence's attention, so the first bad row is named for orientation, not as the culprit.
    """
    start, stop = job.rows
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
        if name == "next_logprob" and stop == len(job.tokens_T):
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
