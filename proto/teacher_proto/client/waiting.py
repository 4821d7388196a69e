"""`Waiting`: how far what was asked of a teacher is, how fast it goes and how long it will take, for people to read.

Clients make it of the progress that a service reports (`ReplicaClient.waiting`), the trainer's targets of their
clients'; whoever waits shows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """What is being waited for. `what` names it, as in "teacher at http://localhost:8000".

    `tokens` are those that were asked about and `tokens_done` those of them whose answers are here; `tokens_ahead` are
    other people's, which the service computes before the last of ours. `tokens_per_second` is the service's rate for
    all of them together, 0 while it is unknown. `silent_s`: for how long nothing was heard.
    """

    what: str
    tokens_done: int
    tokens: int
    tokens_ahead: int = 0
    tokens_per_second: float = 0.0
    silent_s: float = 0.0

    @property
    def tokens_left(self) -> int:
        """What is computed before the last answer is here: the rest of ours, and others' before it."""
        return max(self.tokens - self.tokens_done, 0) + self.tokens_ahead

    @property
    def seconds_left(self) -> float | None:
        """None while the rate is unknown."""
        if not self.tokens_left:
            return 0.0
        return self.tokens_left / self.tokens_per_second if self.tokens_per_second > 0 else None

    def describe(self) -> str:
        """As in `312 of 4,096 tokens, 20 tokens/s, about 3 min 9 s left`."""
        parts = [f"{self.tokens_done:,} of {self.tokens:,} tokens"]
        if self.tokens_ahead:
            parts.append(f"{self.tokens_ahead:,} of others first")
        if self.tokens_per_second > 0:
            parts.append(f"{_rate(self.tokens_per_second)} tokens/s")
        if left_s := self.seconds_left:
            parts.append(f"about {duration(left_s)} left")
        if self.silent_s >= 10:
            parts.append(f"nothing heard for {duration(self.silent_s)}")
        return ", ".join(parts)

    @classmethod
    def sum_of(cls, parts: Iterable[Waiting | None]) -> Waiting | None:
        """Several services that are waited for at once; None where none is.

        They compute side by side, and the whole takes as long as the slowest: the rate is what makes `seconds_left`
        say so.
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


def duration(seconds: float) -> str:
    """Seconds for people: `45 s`, `3 min 9 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second < 10 else f"{tokens_per_second:,.0f}"
