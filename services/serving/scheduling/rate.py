"""How fast the engine is, and from that when to come again. Counted by the answer pipeline, read by whoever must say.

A rate is tokens a second of the time in which the engine had work.
"""

from __future__ import annotations

from collections.abc import Callable


class Rate:
    """`tokens_per_second` is 0 until something has finished; `at_most` bounds it from then back: an engine that has
    had so many tokens for so long without finishing any is no faster than that."""

    def __init__(self, low_s: float = 1.0, high_s: float = 60.0, at_most: Callable[[], float] = lambda: 0.0):
        self._low_s = low_s
        self._high_s = high_s
        self._at_most = at_most
        self._rate = 0.0
        self._since = 0.0
        self._counted = 0
        self._whole = False

    @property
    def tokens_per_second(self) -> float:
        return self._rate

    def count(self, tokens: int, busy_s: float) -> None:
        """Note finished work, by a clock that starts at 0 and runs while there is some. Within the first second the
        rate is that of all there was; then every second moves it a third of the way to what was measured."""
        self._counted += tokens
        elapsed = max(busy_s - self._since, 1e-6)
        measured = self._counted / elapsed
        if not self._whole:
            self._rate = measured
        elif elapsed >= 1.0:
            self._rate += (measured - self._rate) / 3
        if elapsed >= 1.0:
            self._since, self._counted, self._whole = busy_s, 0, True

    def seconds(self, tokens: int) -> float:
        """When to come again, with so many tokens to be computed before: within 1 and 60 s."""
        rate = self._rate or self._at_most()
        if not rate:
            return self._low_s
        return min(self._high_s, max(self._low_s, tokens / rate))
