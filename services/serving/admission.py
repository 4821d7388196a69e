"""The door: who gets in, by what their request will cost. A permit is taken once, in one step, and always given back.

Cost is tokens x (values a token + 1), which is what an answer takes in memory and what scoring is attacked through.
Held by a service's routes around all their work; also where draining begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from teacher_proto.errors import OverloadedError, QuotaError, StillhouseError

# What a unit of cost stands for: an id with its logprob as the engine gives them, in memory, and on its way out.
VALUE_BYTES = 16
# A student counts among those who share for so long after it last asked.
_ACTIVE_S = 5.0


@dataclass(frozen=True)
class Permit:
    """The right to have work of this cost in the house."""

    student: str
    tokens: int
    cost: int


@dataclass
class _Held:
    """What one student has in the house, and when it last asked."""

    cost: int = 0
    tokens: int = 0
    asked_at: float = 0.0


class Admission:
    """Counts permits. All methods run in the event loop's thread and none awaits: a check and its take are one act.

    `unit` is what cost counts, in words. With `shared`, a student may hold a share of the capacity: of those who ask
    of late, one part more than there are.
    """

    def __init__(self, capacity: int, *, shared: bool, retry_after: RetryAfter, unit: str = "tokens x (K + 1)"):
        self._capacity = capacity
        self._shared = shared
        self._retry_after = retry_after
        self._unit = unit
        self._held: dict[str, _Held] = {}
        self._closed: StillhouseError | None = None
        self.cost = 0
        self.tokens = 0
        self.permits = 0
        self.empty = asyncio.Event()
        self.empty.set()

    @property
    def capacity(self) -> int:
        return self._capacity

    def students(self) -> dict[str, int]:
        """Cost held now, by student."""
        return {student: held.cost for student, held in self._held.items() if held.cost}

    def close(self, reason: str) -> None:
        """Let nobody in any more; those inside finish."""
        self._closed = OverloadedError(reason, retry_after=5.0)

    @property
    def closed(self) -> bool:
        return self._closed is not None

    @contextmanager
    def admit(self, student: str, tokens: int, values_per_token: int) -> Iterator[Permit]:
        """A permit for the time of the `with` block. OverloadedError or QuotaError with when to come again."""
        permit = self._take(student, tokens, tokens * (values_per_token + 1))
        try:
            yield permit
        finally:
            self._give_back(permit)

    def _take(self, student: str, tokens: int, cost: int) -> Permit:
        if self._closed is not None:
            raise OverloadedError(self._closed.message, retry_after=self._closed.retry_after)
        now = asyncio.get_running_loop().time()
        free = self._capacity - self.cost
        held = self._note(student, now)
        # Into an empty house everyone is let, so that a request above the capacity is slow and not impossible.
        if self.cost and cost > free:
            raise OverloadedError(
                f"the service is full: {self.cost} of {self._capacity} {self._unit} are taken, this asks {cost}",
                field="sequences", got=cost, limit=free, retry_after=self._retry_after.seconds(self.tokens),
            )  # fmt: skip
        # One part more than there are students, so that a newcomer finds room at once.
        share = self._capacity // (len(self._held) + 1)
        if self._shared and held.cost and held.cost + cost > share:
            raise QuotaError(
                f"{student!r} holds {held.cost} {self._unit} and asks {cost} more, with a share of {share} of "
                f"{self._capacity}: come again when some of that is answered", field="sequences",
                got=held.cost + cost, limit=share,
                retry_after=self._retry_after.seconds(held.tokens * len(self._held)),
            )  # fmt: skip
        held.cost += cost
        held.tokens += tokens
        self.cost += cost
        self.tokens += tokens
        self.permits += 1
        self.empty.clear()
        return Permit(student, tokens, cost)

    def _note(self, student: str, now: float) -> _Held:
        """The account of a student who asks; those who hold nothing and have not asked of late are struck off."""
        held = self._held.setdefault(student, _Held())
        held.asked_at = now
        gone = [name for name, other in self._held.items() if not other.cost and now - other.asked_at > _ACTIVE_S]
        for name in gone:
            del self._held[name]
        return held

    def _give_back(self, permit: Permit) -> None:
        held = self._held[permit.student]
        held.cost -= permit.cost
        held.tokens -= permit.tokens
        self.cost -= permit.cost
        self.tokens -= permit.tokens
        self.permits -= 1
        assert self.cost >= 0 and self.permits >= 0 and held.cost >= 0
        if not self.permits:
            self.empty.set()


class RetryAfter:
    """When to come again: the time that what waits will take at the rate measured of late."""

    def __init__(self, low_s: float = 1.0, high_s: float = 60.0):
        self._low_s = low_s
        self._high_s = high_s
        self._rate = 0.0
        self._since: float | None = None
        self._counted = 0

    @property
    def tokens_per_second(self) -> float:
        return self._rate

    def count(self, tokens: int, now: float) -> None:
        """Note finished work, by a clock that runs while there is some; every second of it the rate moves a third of
        the way to what was measured."""
        if self._since is None:
            self._since = now
        self._counted += tokens
        elapsed = now - self._since
        if elapsed >= 1.0:
            measured = self._counted / elapsed
            self._rate = measured if not self._rate else self._rate + (measured - self._rate) / 3
            self._since, self._counted = now, 0

    def seconds(self, tokens: int) -> float:
        if not self._rate:
            return self._low_s
        return min(self._high_s, max(self._low_s, tokens / self._rate))
