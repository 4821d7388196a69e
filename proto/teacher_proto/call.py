"""One call to a teacher with all its attempts, and the rules by which a failed attempt ends it or not.

Asked again: no connection, silence, a cut or changed body, 429 and 503, an engine's error that says `retryable`.
Asked once more, elsewhere if there is an elsewhere: a record that cannot be a distribution; twice is a poison batch.
Asked again only after the replica has shown who it is: an answer under another fingerprint. Everything else ends the
call at once. Used by `replica_client.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Generic

from teacher_proto.dialect import RequestT
from teacher_proto.errors import (
    BusyError,
    InvalidTargetsError,
    PoisonBatchError,
    StillhouseError,
    TeacherUnavailableError,
    WireError,
    WrongTeacherError,
)
from teacher_proto.replicas import Replica
from teacher_proto.retry import RetryPolicy, Timing
from teacher_proto.waiting import Waiting

MAX_IDENTITY_CHANGES = 3


@dataclass
class ClientStats:
    """What a client has done. `errors` counts by error code, `numeric_changes` the teachers of other rounding."""

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
    """State of one call: which sequences are missing, who was asked, what went wrong."""

    def __init__(self, request: RequestT, policy: RetryPolicy, timing: Timing, deadline_s: float | None):
        self.request = request
        self.missing = set(range(len(request.sequences)))
        self.answered_tokens = 0
        self.heard_at = timing.now()
        self.key = hashlib.sha256(b"".join(tokens_T.tobytes() for tokens_T in request.sequences)).digest()
        self.deadline_s = policy.deadline_s if deadline_s is None else deadline_s
        self.deadline = timing.now() + self.deadline_s
        self.tried: set[Replica[Any]] = set()
        self.attempts = 0
        self._policy = policy
        self._now = timing.now
        self._rejections: list[str] = []
        self._wire_errors = 0
        self._identity_changes = 0

    @property
    def remaining_s(self) -> float:
        return self.deadline - self._now()

    def answered(self, index: int) -> None:
        """The record of this sequence has come."""
        self.missing.discard(index)
        self.answered_tokens += len(self.request.sequences[index])

    def waiting(self, what: str) -> Waiting:
        """How far this call is."""
        return Waiting(what, self.answered_tokens, self.request.num_tokens, silent_s=self._now() - self.heard_at)

    def begin(self, replica: Replica[Any]) -> None:
        self.attempts += 1
        self.tried.add(replica)

    def judge(self, replica: Replica[Any], error: StillhouseError) -> None:
        """Return if the call goes on after `error` of `replica`; raise what ends it."""
        if isinstance(error, InvalidTargetsError):
            self._rejections.append(f"{replica.url}: {error}")
            if len(self._rejections) >= 2:
                raise PoisonBatchError(
                    f"{len(self.missing)} sequences were answered with what cannot be an answer, "
                    f"{len(self._rejections)} times: " + "; ".join(self._rejections),
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
        elif not error.retryable:
            raise error
        if self.remaining_s <= 0:
            raise TeacherUnavailableError(
                f"{len(self.missing)} of {len(self.request.sequences)} sequences are unanswered after "
                f"{self.deadline_s:.1f} s and {self.attempts} attempts; last, {replica.url}: {error}",
                retry_after=error.retry_after if isinstance(error, BusyError) else None,
            ) from error
