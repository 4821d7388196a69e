"""The state of one call to a teacher across all its attempts, and the rules for which failures are retried.

- Retried: no connection, silence, a truncated or corrupted body, 429 and 503, an engine error marked `retryable`.
  Retried in smaller parts: silence of a service that reports no progress, and a body that was too large.
- Retried once, on another replica if there is one: a record that cannot be a distribution. Twice is a poison batch.
- Retried once the replica's identity has been checked again: a response with another fingerprint.

Everything else ends the call at once. Used by `replica_client.py` and `attempts.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Generic, Literal

from teacher_proto.client.replicas import Replica, RetryPolicy, Timing
from teacher_proto.errors import (
    BusyError,
    DeadlyRequestError,
    InvalidTargetsError,
    PoisonBatchError,
    StillhouseError,
    TeacherUnavailableError,
    TooLargeError,
    WireError,
    WrongTeacherError,
)
from teacher_proto.request_checks import RequestT, SequencesRequest
from teacher_proto.wire.responses import Progress

MAX_IDENTITY_CHANGES = 3
# The rate assumed for a service that reports progress, but no rate yet.
SLOWEST_TOKENS_PER_SECOND = 10.0
# An engine that reports its own death was computing our request; a process that vanished may have been killed for any
# reason, so it weighs less. One reported death, or two vanished processes, make a sequence a suspect. Two reported
# deaths, or three vanished processes, while it was computed alone make it the culprit.
Death = Literal["died", "vanished"]
_WEIGHT: dict[Death, int] = {"died": 3, "vanished": 2}
_SUSPECT, _CULPRIT = 3, 6


@dataclass
class ClientStats:
    """Counters of a client. `errors` is by error code; `numeric_changes` counts teachers with other rounding."""

    calls: int = 0
    attempts: int = 0
    probes: int = 0
    bytes_received: int = 0
    budget_waits: int = 0
    numeric_changes: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def count(self, error: StillhouseError) -> None:
        self.errors[error.code] += 1


class Call(Generic[RequestT]):
    """State of one call: which sequences are missing, which replicas were tried, its progress, what went wrong.

    The deadline limits the time without progress: it restarts with each record, and with each progress report that has
    fewer tokens left. While the service reports progress, twice the time that the longest missing sequence takes at the
    reported rate is added.
    """

    def __init__(
        self, request: RequestT, policy: RetryPolicy, timing: Timing, deadline_s: float | None = None,
        evidence: Evidence | None = None,
    ):  # fmt: skip
        self.request = request
        self.missing = set(range(len(request.sequences)))
        self.answered_tokens = 0
        self.tokens_left = request.num_tokens
        self.key = hashlib.sha256(b"".join(tokens_T.tobytes() for tokens_T in request.sequences)).digest()
        self.deadline_s = policy.deadline_s if deadline_s is None else deadline_s
        self.tried: set[Replica[Any]] = set()
        self.attempts = 0
        self.failed = False
        self.evidence = evidence or Evidence()
        # The replica that the call is at, None between attempts, and its last progress report.
        self.replica: Replica[Any] | None = None
        self.progress: Progress | None = None
        # Sequences to request at a time; halved when a body was too large for the service or a proxy.
        self._at_once = len(request.sequences)
        self._policy = policy
        self._now = timing.now
        self._rejections: list[str] = []
        self._wire_errors = 0
        self._identity_changes = 0
        self.start()

    def start(self) -> None:
        """Start the deadline's clock."""
        self.started_at = self.moved_at = self.heard_at = self.reported_at = self._now()

    def tokens_of(self, asked: list[int]) -> int:
        return sum(len(self.request.sequences[index]) for index in asked)

    @property
    def deadline(self) -> float:
        allowance_s = 0.0
        if self.progress is not None and self.missing:
            longest = max(len(self.request.sequences[index]) for index in self.missing)
            allowance_s = 2 * longest / (self.progress.tokens_per_second or SLOWEST_TOKENS_PER_SECOND)
        return self.moved_at + self.deadline_s + allowance_s

    @property
    def remaining_s(self) -> float:
        return self.deadline - self._now()

    def begin(self, replica: Replica[Any]) -> list[int]:
        """Begin an attempt at `replica`; returns the indexes of the sequences to request from it."""
        self.attempts += 1
        self.tried.add(replica)
        self.replica, self.progress = replica, None
        self.heard_at = self._now()
        if suspects := self.evidence.suspects(self.request, self.missing):
            return suspects[:1]
        asked = sorted(self.missing)[: self._at_once]
        tokens = accumulate(self.tokens_of([index]) for index in asked)
        return [index for n, (index, sum_so_far) in enumerate(zip(asked, tokens, strict=True))
                if not n or replica.max_tokens is None or sum_so_far <= replica.max_tokens]  # fmt: skip

    @property
    def suspected(self) -> bool:
        """Whether the next attempt is for a sequence that may kill the engine."""
        return bool(self.evidence.suspects(self.request, self.missing))

    def waited(self, seconds: float) -> None:
        """Exclude `seconds` from the deadline: the client itself held the call back."""
        self.moved_at += seconds

    def died(self, replica: Replica[Any], death: Death, error: StillhouseError, asked: list[int], alone: bool) -> None:
        """The engine died while it computed `asked`. Raises DeadlyRequestError once one of them is the proven cause."""
        missing = [index for index in asked if index in self.missing]
        self.evidence.note(self.request, missing, death, f"{replica.url}: {error}", alone=alone)

    def end(self, failed: bool) -> None:
        """The attempt is over. After a success, every replica counts as untried again."""
        self.replica, self.progress, self.failed = None, None, failed
        if not failed:
            self.tried.clear()

    def heard(self) -> None:
        """Bytes have arrived."""
        self.heard_at = self._now()

    def answered(self, index: int) -> None:
        """The record of this sequence has arrived."""
        self.missing.discard(index)
        self.evidence.forget(self.request, index)
        tokens = len(self.request.sequences[index])
        self.answered_tokens += tokens
        self.tokens_left -= tokens
        self.moved_at = self.heard_at = self._now()

    def reported(self, progress: Progress) -> None:
        """A progress report has arrived."""
        self.heard()
        self.reported_at = self.heard_at
        last, self.progress = self.progress, progress
        left = progress.tokens - progress.tokens_done + progress.tokens_ahead
        if last is None or left < last.tokens - last.tokens_done + last.tokens_ahead:
            self.moved_at = self._now()

    def judge(self, replica: Replica[Any], error: StillhouseError, asked: list[int]) -> None:
        """Decide about the `error` of an attempt at `replica` for the sequences `asked`: return if the call goes on,
        raise what ends it."""
        if isinstance(error, InvalidTargetsError):
            self._rejections.append(f"{replica.url}: {error}")
            if len(self._rejections) >= 2:
                raise PoisonBatchError(
                    f"got invalid targets for {len(self.missing)} sequences in {len(self._rejections)} attempts: "
                    + "; ".join(self._rejections),
                    request=self.request.select(sorted(self.missing)), reasons=tuple(self._rejections),
                ) from error  # fmt: skip
        elif isinstance(error, WrongTeacherError):
            self._identity_changes += 1
            if self._identity_changes > MAX_IDENTITY_CHANGES:
                raise error
        elif isinstance(error, WireError):
            self._wire_errors += 1
            if not error.retryable or self._wire_errors >= self._policy.max_wire_errors:
                raise error
        elif isinstance(error, TooLargeError):
            if len(asked) == 1:
                raise error
            self._at_once = len(asked) // 2
        elif not error.retryable:
            raise error
        if self.remaining_s <= 0:
            raise TeacherUnavailableError(
                f"no response for {len(self.missing)} of {len(self.request.sequences)} sequences after "
                f"{self._now() - self.started_at:.1f} s and {self.attempts} attempts, {self.deadline_s:.1f} s of them "
                f"without progress; last error: {replica.url}: {error}",
                retry_after=error.retry_after if isinstance(error, BusyError) else None,
            ) from error


class Evidence:
    """Finds the sequence that kills the engine. The evidence is kept per sequence of one client, across calls, until
    the sequence is answered, because an engine's restart may take longer than a call waits.

    When an engine dies, every sequence that was being computed is a suspect. If all were retried together, the cause
    would kill the next engine too, and its neighbours would look as guilty. So suspects are retried one at a time, with
    nothing else of this client in flight (`Lanes`): an innocent one is answered and cleared, and the one that kills the
    engine again, twice, is named.
    """

    def __init__(self) -> None:
        self._beside: Counter[bytes] = Counter()
        self._alone: Counter[bytes] = Counter()
        self._reasons: dict[bytes, list[str]] = {}

    def suspects(self, request: SequencesRequest, missing: Iterable[int]) -> list[int]:
        """Those of `missing` that must be requested alone, the least suspect first, since they are soon cleared."""
        if not self._reasons:
            return []
        keys = {index: _key(request, index) for index in missing}
        found = [index for index, key in keys.items() if self._alone[key] or self._beside[key] >= _SUSPECT]
        return sorted(found, key=lambda index: (self._alone[keys[index]], index))

    def note(
        self, request: SequencesRequest, indexes: Iterable[int], death: Death, reason: str, *, alone: bool
    ) -> None:
        """The engine died while these were computed. Raises DeadlyRequestError once one of them has killed it often
        enough while no other sequence of this client was being computed."""
        for index in indexes:
            key = _key(request, index)
            (self._alone if alone else self._beside)[key] += _WEIGHT[death]
            self._reasons.setdefault(key, []).append(f"{'alone' if alone else 'with others'}, {reason}")
            if self._alone[key] >= _CULPRIT:
                raise _deadly(request, index, tuple(self._reasons[key]))

    def forget(self, request: SequencesRequest, index: int) -> None:
        """The sequence has been answered: drop the evidence against it."""
        if self._reasons:
            key = _key(request, index)
            for counts in (self._beside, self._alone, self._reasons):
                counts.pop(key, None)


def _key(request: SequencesRequest, index: int) -> bytes:
    return hashlib.sha256(request.sequences[index].tobytes()).digest()


def _deadly(request: SequencesRequest, index: int, reasons: tuple[str, ...]) -> DeadlyRequestError:
    tokens_T = request.sequences[index]
    shown = ", ".join([*map(str, tokens_T[:8].tolist()), *(["..."] if len(tokens_T) > 8 else [])])
    return DeadlyRequestError(
        f"the engine dies on one sequence of {len(tokens_T)} tokens ({shown}), {len(reasons)} times so far, but "
        "handles others: " + "; ".join(reasons),
        field="sequences", request=request.select([index]), reasons=reasons,
    )  # fmt: skip


class Lanes:
    """A shared-exclusive lock: any number of holders, or one alone. One that waits to be alone holds up newcomers."""

    def __init__(self) -> None:
        self._running = 0
        self._alone = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def enter(self, *, alone: bool) -> AsyncIterator[None]:
        self._alone += alone
        try:
            await self._until((lambda: not self._running) if alone else (lambda: not self._alone))
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1
        finally:
            self._alone -= alone
            self._changed.set()

    async def _until(self, free: Callable[[], bool]) -> None:
        while not free():
            self._changed.clear()
            await self._changed.wait()
