"""A term's coefficient as a function of the step. Called by the loop."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def weight_at(points: Sequence[tuple[int, float]], step: int) -> float:
    """Straight lines through the points (step, weight); the first weight before them, the last one after.

    ValueError unless there are points, in the order of their steps.
    """
    if not points or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError(f"weights by step: got {list(points)}, expected points (step, weight) of rising steps")
    if step <= points[0][0]:
        return points[0][1]
    for (start, before), (stop, after) in pairwise(points):
        if step < stop:
            return before + (after - before) * (step - start) / (stop - start)
    return points[-1][1]
