"""The learning rate's course: pure functions of the step. Called by `optimizer`.

A factor is a share of a group's own peak rate: 1 at the peak, its floor at the end. No factor ever exceeds 1, so that
no group's floor can raise its rate.
"""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["cosine", "wsd", "linear", "constant"]


def rate_factor(
    kind: Kind, step: int, *, steps: int, warmup_steps: int = 0, decay_steps: int | None = None, floor: float = 0.0
) -> float:
    """The factor of update `step` (from 0) out of `steps`.

    Warm-up: (step + 1) / warmup_steps, so that the first update already moves. After it the fall goes from 1 to `floor`
    at the last update: `cosine` and `linear` from the end of the warm-up, `wsd` over the last `decay_steps` (default a
    tenth of the run) in a straight line, `constant` never.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    start = warmup_steps
    if kind == "wsd":
        start = max(warmup_steps, steps - (decay_steps if decay_steps is not None else max(1, steps // 10)))
    # How much of the fall is over after this update: 1 at the last one.
    done = 0.0 if step < start else min(1.0, (step - start + 1) / max(1, steps - start))
    fall = 0.5 * (1.0 - math.cos(math.pi * done)) if kind == "cosine" else done
    return 1.0 - (1.0 - floor) * fall
