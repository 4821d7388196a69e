"""Admission: which requests are let in, by their cost, and which are told to retry later (429, 503). A permit is taken
once, in one step, and always given back.

Cost is tokens x (values per token + 1): what a response takes in memory, and so what an attack on the service would
use up. A service's routes hold a permit around all their work; draining also begins here. A request that finds no
room is refused or waits. Waiting requests are admitted in order of arrival, and no later one overtakes one that waits
for room.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serving.scheduling.fair import Rate
from teacher_proto.errors import OutOfRangeError, OverloadedError, QuotaError, StillhouseError

# A client counts as one of those that share the capacity for this long after its last request.
_ACTIVE_S = 5.0
# A request without progress reports waits this long, and only if it takes so large a part of the capacity that small
# requests would keep it out forever; any other is refused at once.
_WITHOUT_PROGRESS_S = 5.0
_LARGE = 0.25
_MAX_WAITING = 1024
# How many canaries may bypass all that, per client and in total, within `_WITHIN_S`.
PER_CLIENT = 4
PER_SERVICE = 16
_WITHIN_S = 60.0


@dataclass(frozen=True)
class Permit:
    """The right to have work of this cost in flight. Control traffic costs nothing; `ControlLane` bounds it."""

    client: str
    tokens: int
    cost: int

    @classmethod
    def of(cls, client: str, tokens: int, values_per_token: int) -> Permit:
        return cls(client, tokens, tokens * (values_per_token + 1))


@dataclass(eq=False)
class _Waiting:
    permit: Permit
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass
class _Held:
    """What one client has in flight and waiting, and when it last sent a request."""

    permits: int = 0
    cost: int = 0
    tokens: int = 0
    waiting: int = 0
    asked_at: float = 0.0


class Admission:
    """Counts permits. All methods run in the event loop's thread, so that a check and the grant after it are atomic.

    `unit` is what cost counts, in words. With `shared`, a client may hold a share of the capacity: with n recently
    active clients, one part in n + 1. `max_cost` is the highest cost of a single request, the capacity unless it is
    set; a request that costs more than the capacity waits until nothing else is in flight.
    """

    def __init__(self, capacity: int, *, shared: bool, rate: Rate, unit: str = "tokens x (K + 1)"):
        self._capacity = capacity
        self._shared = shared
        self._rate = rate
        self._unit = unit
        self._held: dict[str, _Held] = {}
        self._waiting: list[_Waiting] = []
        self._closed: StillhouseError | None = None
        self.max_cost = capacity
        self.cost = 0
        self.tokens = 0
        self.permits = 0
        self.empty = asyncio.Event()
        self.empty.set()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def waiting(self) -> int:
        """Number of requests waiting for a permit."""
        return len(self._waiting)

    def clients(self) -> dict[str, int]:
        """Cost in flight, by client."""
        return {client: held.cost for client, held in self._held.items() if held.cost}

    def close(self, reason: str) -> None:
        """Admit nothing from now on; requests in flight finish, waiting ones are refused."""
        self._closed = OverloadedError(reason, retry_after=5.0)
        for waiting in self._waiting:
            if not waiting.granted.done():
                waiting.granted.set_exception(self._refusal())

    @property
    def closed(self) -> bool:
        return self._closed is not None

    @asynccontextmanager
    async def admit(self, permit: Permit, *, told: bool = False) -> AsyncIterator[Permit]:
        """Hold the permit for the duration of the `async with` block.

        A client that is `told` of its request's progress may wait for a permit indefinitely; others get OverloadedError
        or QuotaError with the time to retry, at once or, for a large request, after some seconds. OutOfRangeError for
        what even an empty service would not admit.
        """
        await self._take(permit, told)
        try:
            yield permit
        finally:
            self._give_back(permit)

    def tokens_before(self, permit: Permit) -> int:
        """Tokens of the requests that are waiting ahead of this one; 0 once it is admitted."""
        before = 0
        for waiting in self._waiting:
            if waiting.permit is permit:
                return before
            before += waiting.permit.tokens
        return 0

    def _refusal(self) -> OverloadedError:
        assert self._closed is not None
        return OverloadedError(self._closed.message, retry_after=self._closed.retry_after)

    async def _take(self, permit: Permit, told: bool) -> None:
        if self._closed is not None:
            raise self._refusal()
        if permit.cost > self.max_cost:
            raise OutOfRangeError(
                f"sequences: the request costs {permit.cost}, expected at most {self.max_cost} ({self._unit}): split "
                "it, or request less per token", field="sequences", got=permit.cost, limit=self.max_cost,
            )  # fmt: skip
        held = self._note(permit.client)
        waiting = _Waiting(permit)
        # Control traffic costs nothing and never waits.
        if not permit.cost:
            self._grant(waiting)
            return
        self._waiting.append(waiting)
        held.waiting += 1
        try:
            self._admit_waiting()
            if not waiting.granted.done():
                await self._wait(waiting, told)
            waiting.granted.result()
        except BaseException:
            if waiting.granted.done() and not waiting.granted.cancelled() and waiting.granted.exception() is None:
                self._give_back(permit)  # it was granted just as its client left
            raise
        finally:
            held.waiting -= 1
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._admit_waiting()

    async def _wait(self, waiting: _Waiting, told: bool) -> None:
        """Wait for the grant. OverloadedError or QuotaError if it may not wait, or has waited long enough."""
        permit = waiting.permit
        # Places in the queue are shared like the capacity, so that no client fills it alone.
        most = _MAX_WAITING // (len(self._held) + 1) if self._shared else _MAX_WAITING
        limit_s = None if told else _WITHOUT_PROGRESS_S if permit.cost >= _LARGE * self._capacity else 0.0
        if limit_s == 0 or self._held[permit.client].waiting > most:
            raise self._no_room(permit)
        try:
            async with asyncio.timeout(limit_s):
                # Shielded: a timeout ends the wait but not the future, which `_take` checks once more.
                await asyncio.shield(waiting.granted)
        except TimeoutError:
            raise self._no_room(permit) from None

    def _no_room(self, permit: Permit) -> StillhouseError:
        held, share = self._held[permit.client], self._share()
        if self._beyond_share(permit):
            return QuotaError(
                f"{permit.client!r} uses {held.cost} {self._unit} and requests {permit.cost} more, but its share is "
                f"{share} of {self._capacity}: retry when some of its requests have finished", field="sequences",
                got=held.cost + permit.cost, limit=share,
                retry_after=self._rate.seconds(held.tokens * len(self._held)),
            )  # fmt: skip
        free = max(0, self._capacity - self.cost)
        return OverloadedError(
            f"the service is full: {self.cost} of {self._capacity} {self._unit} are in use and "
            f"{len(self._waiting) - 1} requests are waiting; this one needs {permit.cost}", field="sequences",
            got=permit.cost, limit=free, retry_after=self._rate.seconds(self.tokens),
        )  # fmt: skip

    def _share(self) -> int:
        # One part more than there are clients, so that a new one finds room at once.
        return self._capacity // (len(self._held) + 1)

    def _beyond_share(self, permit: Permit) -> bool:
        held = self._held[permit.client]
        return self._shared and bool(held.cost) and held.cost + permit.cost > self._share()

    def _admit_waiting(self) -> None:
        """Grant permits to waiting requests, in order. One that waits for its client's share may be overtaken, though
        not by later requests of that client; one that waits for room may not."""
        held_up: set[str] = set()
        for waiting in list(self._waiting):
            permit = waiting.permit
            if waiting.granted.done() or permit.client in held_up:
                continue
            if self._beyond_share(permit):
                held_up.add(permit.client)
                # Every waiting client is held up by its own share: nothing further back can be admitted.
                if len(held_up) == sum(held.waiting > 0 for held in self._held.values()):
                    return
            # No capacity left: stop here, so that small requests behind a large one do not keep it out. An empty
            # service lets anything in, up to `max_cost`.
            elif self.cost and self.cost + permit.cost > self._capacity:
                return
            else:
                self._waiting.remove(waiting)
                self._grant(waiting)

    def _grant(self, waiting: _Waiting) -> None:
        permit, held = waiting.permit, self._held[waiting.permit.client]
        held.permits += 1
        held.cost += permit.cost
        held.tokens += permit.tokens
        self.cost += permit.cost
        self.tokens += permit.tokens
        self.permits += 1
        self.empty.clear()
        waiting.granted.set_result(None)

    def _note(self, client: str) -> _Held:
        """The account of a client that sends a request; accounts without requests now or recently are deleted."""
        now = asyncio.get_running_loop().time()
        held = self._held.setdefault(client, _Held())
        held.asked_at = now
        for name, other in list(self._held.items()):
            if not other.permits and not other.waiting and now - other.asked_at > _ACTIVE_S:
                del self._held[name]
        return held

    def _give_back(self, permit: Permit) -> None:
        held = self._held[permit.client]
        held.permits -= 1
        held.cost -= permit.cost
        held.tokens -= permit.tokens
        self.cost -= permit.cost
        self.tokens -= permit.tokens
        self.permits -= 1
        assert self.cost >= 0 and self.permits >= 0 and held.cost >= 0
        if not self.permits:
            self.empty.set()
        self._admit_waiting()


class ControlLane:
    """Lets control traffic bypass queue and admission: a few requests a minute, per client and in total.

    Canaries are small and always computed. Those beyond the allowance are queued and charged like any other request.
    Used by a service's routes. All methods run in the event loop's thread.
    """

    def __init__(self) -> None:
        self._passed: deque[tuple[float, str]] = deque()

    def take(self, client: str) -> bool:
        """Whether this client may bypass them now; if so, counts it."""
        now = asyncio.get_running_loop().time()
        while self._passed and now - self._passed[0][0] > _WITHIN_S:
            self._passed.popleft()
        of_client = sum(name == client for _, name in self._passed)
        if of_client >= PER_CLIENT or len(self._passed) >= PER_SERVICE:
            return False
        self._passed.append((now, client))
        return True
