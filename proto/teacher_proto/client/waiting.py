"""The progress of requests to a teacher, their rate and the time left, as a `Waiting` for people to read.

`InFlight` computes it for `ReplicaClient.waiting`, from the client's outstanding requests and the services' progress
reports; the trainer's targets add up those of their clients, and whoever waits shows it. Requests that were in flight
together are counted until the last of them is done, so that the count does not drop when one of sixteen is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from teacher_proto.process.stage_text import duration

if TYPE_CHECKING:
    from teacher_proto.wire.responses import Progress

RATE_WINDOW_S = 60.0


@dataclass(frozen=True)
class Waiting:
    """What is being waited for. `what` names it, as in "teacher at http://localhost:8000".

    `tokens` were requested, and `tokens_done` of them have been answered; `tokens_ahead` are those of other clients
    that the service computes before the last of ours. `tokens_per_second` is the service's rate over all of them, 0
    while it is unknown. `silent_s`: seconds since anything was received.
    """

    what: str
    tokens_done: int
    tokens: int
    tokens_ahead: int = 0
    tokens_per_second: float = 0.0
    silent_s: float = 0.0

    @property
    def tokens_left(self) -> int:
        """Tokens to be computed until we have everything: the rest of ours, and those of others ahead of them."""
        return max(self.tokens - self.tokens_done, 0) + self.tokens_ahead

    @property
    def seconds_left(self) -> float | None:
        """None while the rate is unknown."""
        if not self.tokens_left:
            return 0.0
        return self.tokens_left / self.tokens_per_second if self.tokens_per_second > 0 else None

    def describe(self) -> str:
        """For example `312 of 4,096 tokens, 20 tokens/s, about 3 min 9 s left`."""
        parts = [f"{self.tokens_done:,} of {self.tokens:,} tokens"]
        if self.tokens_ahead:
            parts.append(f"{self.tokens_ahead:,} of other clients first")
        if self.tokens_per_second > 0:
            parts.append(f"{_rate(self.tokens_per_second)} tokens/s")
        if left_s := self.seconds_left:
            parts.append(f"about {duration(left_s)} left")
        if self.silent_s >= 10:
            parts.append(f"no response for {duration(self.silent_s)}")
        return ", ".join(parts)

    @classmethod
    def sum_of(cls, parts: Iterable[Waiting | None]) -> Waiting | None:
        """The sum over several services that are waited for at once; None if there are none.

        They work in parallel, so the whole takes as long as the slowest: the rate is chosen such that `seconds_left` is
        the slowest one's.
        """
        asked = [part for part in parts if part is not None]
        if len(asked) < 2:
            return asked[0] if asked else None
        times_s = [part.seconds_left for part in asked if part.tokens_left]
        known_s = [time_s for time_s in times_s if time_s is not None]
        left = sum(part.tokens_left for part in asked)
        return cls(
            what=", ".join(dict.fromkeys(part.what for part in asked)),
            tokens_done=sum(part.tokens_done for part in asked),
            tokens=sum(part.tokens for part in asked),
            tokens_ahead=sum(part.tokens_ahead for part in asked),
            tokens_per_second=left / max(known_s) if known_s and len(known_s) == len(times_s) else 0.0,
            silent_s=min(part.silent_s for part in asked),
        )


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second < 10 else f"{tokens_per_second:,.0f}"


class TrackedCall(Protocol):
    """The part of `client.call.Call` that is read here: its replica, its progress, and when it was last heard from."""

    @property
    def replica(self) -> Any: ...
    @property
    def progress(self) -> Progress | None: ...
    @property
    def answered_tokens(self) -> int: ...
    @property
    def tokens_left(self) -> int: ...
    @property
    def heard_at(self) -> float: ...
    @property
    def reported_at(self) -> float: ...


@dataclass(eq=False)
class Entry:
    """One request, and the calls that it was split into: none until the service's limits are known."""

    tokens: int
    calls: Sequence[TrackedCall] = ()

    @property
    def tokens_done(self) -> int:
        return sum(call.answered_tokens for call in self.calls)


@dataclass(eq=False)
class _Group:
    """Requests that were begun before the first of them was done; `tokens_finished` are those of the done ones."""

    live: set[Entry] = field(default_factory=set)
    tokens_finished: int = 0


class InFlight:
    """The outstanding requests of one client. `now` is a monotonic clock. `waiting` may be called from any thread,
    everything else on the client's event loop."""

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._groups: list[_Group] = []
        self._answered: deque[tuple[float, int]] = deque()

    def begin(self, tokens: int) -> Entry:
        if not self._groups or self._groups[-1].tokens_finished:
            self._groups.append(_Group())
        if not any(group.live for group in self._groups):
            self._answered.clear()
            self._answered.append((self._now(), 0))
        entry = Entry(tokens)
        self._groups[-1].live.add(entry)
        return entry

    def end(self, entry: Entry) -> None:
        """The request was answered or given up."""
        group = next(group for group in self._groups if entry in group.live)
        group.live.remove(entry)
        group.tokens_finished += entry.tokens
        self._groups = [group for group in self._groups if group.live]

    def answered(self, tokens: int) -> None:
        """The record of a sequence of this many tokens has arrived."""
        self._answered.append((self._now(), tokens))
        while len(self._answered) > 2 and self._answered[1][0] < self._now() - RATE_WINDOW_S:
            self._answered.popleft()

    def waiting(self, what: str, replicas: int = 1) -> Waiting | None:
        """All requests together; None if nothing is in flight. `replicas` share what is not sent yet."""
        groups = list(self._groups)
        entries = [entry for group in groups for entry in list(group.live)]
        if not entries:
            return None
        waiting = self.waiting_for(what, entries, replicas)
        finished = sum(group.tokens_finished for group in groups)
        return Waiting(
            what, waiting.tokens_done + finished, waiting.tokens + finished, waiting.tokens_ahead,
            waiting.tokens_per_second, waiting.silent_s,
        )  # fmt: skip

    def waiting_for(self, what: str, entries: Sequence[Entry], replicas: int = 1) -> Waiting:
        """Only these requests."""
        return waiting_for(what, entries, self._now(), replicas, self._rate(), self._received_since)

    def _received_since(self, at: float) -> int:
        return sum(tokens for when, tokens in list(self._answered) if when > at)

    def _rate(self) -> float:
        """Recently answered tokens per second over all replicas, for services that do not report a rate."""
        answered = list(self._answered)
        tokens = sum(tokens for _, tokens in answered[1:])
        return tokens / max(self._now() - answered[0][0], 1e-3) if tokens else 0.0


def waiting_for(
    what: str, entries: Sequence[Entry], now: float, replicas: int = 1, measured_rate: float = 0.0,
    received_since: Callable[[float], int] = lambda at: 0,
) -> Waiting:  # fmt: skip
    """The progress of these requests together, from the reports of the services. `received_since(time)` is the number
    of tokens answered since then: a report from before still counts them as ahead."""
    asked: dict[Any, list[TrackedCall]] = defaultdict(list)
    unsent = sum(entry.tokens for entry in entries if not entry.calls)
    calls = [call for entry in entries for call in entry.calls]
    for call in calls:
        if (replica := call.replica) is None:
            unsent += call.tokens_left
        elif call.tokens_left:
            asked[replica].append(call)
    share = unsent / max(replicas, len(asked))
    total = Waiting.sum_of(_part(what, group, share, received_since) for group in asked.values())
    rate = total.tokens_per_second if total is not None else 0.0
    return Waiting(
        what,
        tokens_done=sum(entry.tokens_done for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        tokens_ahead=total.tokens_ahead if total is not None and rate else 0,
        tokens_per_second=rate or measured_rate,
        silent_s=min((now - call.heard_at for call in calls), default=0.0),
    )


def _part(what: str, calls: Sequence[TrackedCall], unsent: float, received_since: Callable[[float], int]) -> Waiting:
    """The work that one replica still has to do for us, and for others before the last of ours."""
    sent = sum(call.tokens_left for call in calls)
    # Read each `progress` once: the client's thread may change it meanwhile.
    reported = [(call, progress) for call in calls if (progress := call.progress) is not None]
    # The last of ours is done after this many tokens, whether or not a service counts our other requests as ahead.
    ahead = max(
        (call.tokens_left + max(progress.tokens_ahead - received_since(call.reported_at), 0)
         for call, progress in reported), default=0,
    )  # fmt: skip
    _, latest = max(reported, key=lambda pair: pair[0].reported_at, default=(None, None))
    # Assume that what is not sent yet will have as many tokens of others ahead of it, in proportion.
    others = max(ahead - sent, 0) * (1 + unsent / max(sent, 1))
    rate = latest.tokens_per_second if latest is not None else 0.0
    return Waiting(what, 0, sent + round(unsent), round(others), rate)
