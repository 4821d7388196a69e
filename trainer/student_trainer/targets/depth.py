"""How many batches to keep under way: fixed, or as many as the measured latency needs. Used by `prefetch`."""

from __future__ import annotations

import math
from collections import deque

from student_trainer.settings import PrefetchSettings

WINDOW = 64
START = 2


class DepthControl:
    """`depth` is the number of batches under way beside the one in use.

    `auto` covers the latency that nine batches in ten stay below, plus one batch for jitter. A teacher that is short of
    throughput answers later the more it is asked, so the depth stays within four times what the quickest answer of the
    window needs; and within `max_bytes` of targets, by the largest batch so far.
    """

    def __init__(self, settings: PrefetchSettings):
        self._settings = settings
        self._latencies: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._largest = 0
        self.depth = START if settings.depth == "auto" else settings.depth

    def observe(self, latency_s: float, step_s: float | None, nbytes: int) -> None:
        """A batch was handed over: how long it took to make, how long the step before it worked, its bytes."""
        self._latencies.append(latency_s)
        self._largest = max(self._largest, nbytes)
        if step_s is not None:
            self._steps.append(step_s)
        if self._settings.depth == "auto" and self._steps:
            self.depth = self._wanted()

    def _wanted(self) -> int:
        step_s = max(sorted(self._steps)[len(self._steps) // 2], 1e-3)
        latencies = sorted(self._latencies)
        covering = math.ceil(latencies[int(0.9 * (len(latencies) - 1))] / step_s) + 1
        unloaded = math.ceil(latencies[0] / step_s)
        by_bytes = self._settings.max_bytes // self._largest if self._largest else self._settings.max_depth
        return max(1, min(covering, 4 * unloaded + 1, by_bytes, self._settings.max_depth))
