"""Fair queueing: clients take turns at the engine by tokens, however many requests each of them sends; and its rate.

Every client has a lane, a queue of tickets with a count of the tokens served; the lane with the lowest count goes next.
A lane that becomes active starts at the current count, so that being idle earns no credit. Only `window` tokens are
given to the engine at a time, since it computes in its own order what it has been given, and no more than `pace`, so
that control traffic, which bypasses the lanes, waits only briefly. Used by the coalescer, which also updates the
`Rate`; that is read wherever a time to retry is needed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Ticket:
    """Work of `tokens` tokens that waits for its turn, in one lane or, if several clients want it, in several."""

    tokens: int
    generation: int = -1
    left: bool = False
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def waiting(self) -> bool:
        return not self.turn.done()


@dataclass(eq=False)
class _Lane:
    served: float = 0.0
    waiting: deque[Ticket] = field(default_factory=deque)


@dataclass(frozen=True)
class _Order:
    """A snapshot of the lanes: the tokens waiting in each, and how many of its lane's are ahead of each ticket."""

    at: float
    totals: dict[_Lane, int]
    before: dict[Ticket, list[tuple[_Lane, int]]]

    def tokens_before(self, ticket: Ticket) -> int:
        """Tokens of all lanes that are served before this ticket."""
        places = self.before.get(ticket)
        if places is None:  # queued after the snapshot
            return sum(self.totals.values())
        return min(
            before + sum(
                # Another lane goes first until it has been served as much as ours will have been, or is empty.
                min(total, max(0, int(own.served + before - lane.served)))
                for lane, total in self.totals.items() if lane is not own
            )
            for own, before in places
        )  # fmt: skip


_ORDER_S = 0.5  # maximum age of a snapshot, since making one visits every ticket


class FairQueue:
    """All methods run in the event loop's thread. `window`, `pace` and `running` are in tokens."""

    def __init__(self, window: int):
        self._full_window = window
        self.window = window
        self.pace = window
        self.running = 0
        self._lanes: dict[str, _Lane] = {}
        self._now_serving = 0.0
        self._generation = 0
        self._busy_s = 0.0
        self._busy_since = 0.0
        self._order: _Order | None = None

    def busy_s(self) -> float:
        """Total seconds during which work was running: the clock that rates are measured by."""
        running_for = asyncio.get_running_loop().time() - self._busy_since if self.running else 0.0
        return self._busy_s + running_for

    def rate_at_most(self) -> float:
        """Upper bound of the engine's tokens per second if nothing of what it runs has finished; 0 if unknown."""
        busy_s = self.busy_s()
        return self.running / busy_s if self.running and busy_s > 0.0 else 0.0

    @property
    def waiting_tokens(self) -> int:
        tickets = {ticket for lane in self._lanes.values() for ticket in lane.waiting if ticket.waiting}
        return sum(ticket.tokens for ticket in tickets)

    def tokens_ahead(self, tickets: Collection[Ticket]) -> int:
        """Tokens of others that the engine computes before the last of these tickets, in the present order."""
        mine = [ticket for ticket in tickets if not ticket.left]
        if not mine:
            return 0
        waiting = [ticket for ticket in mine if ticket.waiting]
        ahead = self.running - sum(ticket.tokens for ticket in mine if not ticket.waiting)
        if waiting:
            order = self._present_order()
            last = max(waiting, key=order.tokens_before)
            own = sum(ticket.tokens for ticket in waiting if ticket is not last)
            ahead += max(0, order.tokens_before(last) - own)
        return max(0, ahead)

    def tokens_in_all(self) -> int:
        """Tokens running or waiting."""
        return self.running + sum(self._present_order().totals.values())

    def _present_order(self) -> _Order:
        now = asyncio.get_running_loop().time()
        if self._order is None or now - self._order.at > _ORDER_S:
            self._order = _Order(now, {}, {})
            for lane in self._lanes.values():
                total = 0
                for ticket in lane.waiting:
                    if ticket.waiting:
                        self._order.before.setdefault(ticket, []).append((lane, total))
                        total += ticket.tokens
                self._order.totals[lane] = total
        return self._order

    def rush(self, ticket: Ticket) -> None:
        """Serve a ticket at once, whatever is running: for control traffic, which is bounded elsewhere."""
        self._serve(ticket)

    def join(self, client: str, ticket: Ticket) -> None:
        """Put a ticket into a client's lane. It is served once, by the first of its lanes to come up, and charged to
        that one."""
        lane = self._lanes.get(client)
        if lane is None:
            # A new lane starts level with the one being served, neither behind nor ahead.
            lane = self._lanes[client] = _Lane(served=self._now_serving)
        lane.waiting.append(ticket)
        self._dispatch()

    @asynccontextmanager
    async def turn(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait until the ticket is served; its tokens count as running for the duration of the block."""
        try:
            await ticket.turn
            yield
        finally:
            self.leave(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Give back a turn or a place in the queue. `turn` does so; this is for what is cancelled before it begins."""
        if ticket.left:
            return
        ticket.left = True
        # It had its turn, which ends now. The busy clock stands still while nothing runs, so bring it up to date.
        if ticket.turn.done() and not ticket.turn.cancelled():
            self._busy_s = self.busy_s()
            self._busy_since = asyncio.get_running_loop().time()
            self.running -= ticket.tokens
        ticket.turn.cancel()
        self._dispatch()

    def halve(self, ticket: Ticket) -> None:
        """The engine ran out of memory on this ticket: give it half as much at a time. Tickets that were served before
        the last halving have no effect."""
        # Several tickets of one batch fail together: the first halves the window, the others are of the old generation.
        if ticket.generation == self._generation:
            self._generation += 1
            self.window = max(1, self.window // 2)

    def recover(self) -> None:
        """Work succeeded: widen the window by a thousandth of the full one."""
        if self.window < self._full_window:
            # Multiplicative decrease, additive increase, as in congestion control.
            self.window = min(self._full_window, self.window + max(1, self._full_window // 1000))

    def _dispatch(self) -> None:
        while (lane := self._next_lane()) is not None:
            ticket = lane.waiting[0]
            # An idle engine takes any ticket, however large: nothing that was admitted waits forever.
            if self.running and self.running + ticket.tokens > min(self.window, self.pace):
                return
            lane.waiting.popleft()
            self._now_serving = lane.served
            # Charged when it is served, not when it ends: else a lane could have all it has served at one count.
            lane.served += ticket.tokens
            self._serve(ticket)

    def _serve(self, ticket: Ticket) -> None:
        if not self.running:
            self._busy_since = asyncio.get_running_loop().time()
        self.running += ticket.tokens
        ticket.generation = self._generation
        ticket.turn.set_result(None)

    def _next_lane(self) -> _Lane | None:
        """The lane with the lowest count among those with a ticket waiting. Deletes empty lanes that aren't ahead."""
        best = None
        for client, lane in list(self._lanes.items()):
            while lane.waiting and not lane.waiting[0].waiting:
                lane.waiting.popleft()
            if not lane.waiting:
                # An empty lane ahead of the present count is kept: otherwise its client could come back level.
                if lane.served <= self._now_serving:
                    del self._lanes[client]
            elif best is None or lane.served < best.served:
                best = lane
        return best


class Rate:
    """Tokens per second of the time in which the engine had work, and the time to retry that follows from it.

    `tokens_per_second` is 0 until something has finished; until then `seconds` uses `at_most`: an engine that has had
    so many tokens for so long without finishing any is no faster than that.
    """

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
        """Record finished work. `busy_s` is a clock that starts at 0 and runs while there is work. During the first
        second the rate is the average so far; then every second moves it a third of the way to the measured one."""
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
        """When to retry, with this many tokens to be computed first: between `low_s` and `high_s`."""
        rate = self._rate or self._at_most()
        if not rate:
            return self._low_s
        return min(self._high_s, max(self._low_s, tokens / rate))
