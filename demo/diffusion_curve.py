"""Quality of a student's text against tokens per forward pass: measures of a curve through such points.
Called by `diffusion_table`; pure functions.

A point is (tokens per forward pass, quality). Lower is better for perplexity, and higher for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]
# How far a point may be below the curve's first and still count, and how fast lower ones count less (d3LLM).
MAY_LOSE, ALPHA = 5.0, 3.0


def area_under(points: Sequence[Point], best: float) -> float:
    """AUP of d3LLM: the area under accuracy (0 to 100) by tokens per pass, where accuracy counts exponentially less the
    further it is below `best`, the highest of all compared curves. Points more than `MAY_LOSE` below the first one, the
    slowest, are left out. ValueError without points.
    """
    if not points:
        raise ValueError("got no points, expected one or more of (tokens per pass, accuracy)")
    ordered = sorted(points)
    (rate, good), kept = ordered[0], ordered[0][1] - MAY_LOSE
    area = rate * good
    before_rate, before = rate, good * _weight(good, best)
    for rate, good in ordered[1:]:
        if good < kept:
            continue
        weighed = good * _weight(good, best)
        area += (rate - before_rate) * (weighed + before) / 2
        before_rate, before = rate, weighed
    return area


def _weight(good: float, best: float) -> float:
    return min(math.exp(-ALPHA * (1.0 - good / best)), 1.0)


def tokens_per_pass_at(points: Sequence[Point], perplexity: float) -> float | None:
    """The most tokens per pass at which the curve's perplexity is not above this, interpolated linearly between its
    points (in the logarithm of perplexity); None if it always is.
    """
    ordered = sorted(points)
    wanted = math.log(perplexity)
    found: float | None = max((rate for rate, value in ordered if math.log(value) <= wanted), default=None)
    for (rate, value), (next_rate, next_value) in pairwise(ordered):
        low, high = math.log(value), math.log(next_value)
        if min(low, high) < wanted < max(low, high):
            crossing = rate + (next_rate - rate) * (wanted - low) / (high - low)
            found = crossing if found is None else max(found, crossing)
    return found
