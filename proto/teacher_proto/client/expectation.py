"""Who a client expects to answer: the identity, the fingerprint and the canary that every replica is held against.

Used by `replica_client.py`. Without an expectation of the caller's, the first teacher met becomes it.
"""

from __future__ import annotations

import logging

from teacher_proto.client.call import ClientStats
from teacher_proto.client.canary import Canary, tolerance
from teacher_proto.errors import WrongTeacherError
from teacher_proto.identity import TeacherIdentity, compare_fingerprints
from teacher_proto.info import ServiceInfo

log = logging.getLogger(__name__)


class Expectation:
    """A semantic difference raises WrongTeacherError; a numeric one is warned of and counted, or raises if refused."""

    def __init__(
        self,
        expected: TeacherIdentity | str | None,
        canary: Canary | None,
        canary_tolerance: float | None,
        refuse_numeric_change: bool,
        stats: ClientStats,
    ):
        self.identity = expected if isinstance(expected, TeacherIdentity) else None
        self.fingerprint = expected.fingerprint if isinstance(expected, TeacherIdentity) else expected
        self.canary = canary
        self._tolerance = canary_tolerance
        self._refuse_numeric = refuse_numeric_change
        self._stats = stats
        self._warned: set[str] = set()

    def check_identity(self, info: ServiceInfo, url: str) -> None:
        if self.fingerprint is None:
            self.fingerprint = info.fingerprint
        if self.identity is None and self.fingerprint == info.fingerprint:
            self.identity = info.identity
        self._check(self.fingerprint, info, url)

    def check_fingerprint(self, fingerprint: str, info: ServiceInfo) -> None:
        """Hold a teacher against the fingerprint that a single request names."""
        self._check(fingerprint, info, "the teacher")

    def check_canary(self, canary: Canary, info: ServiceInfo, url: str) -> None:
        if self.canary is None:
            self.canary = canary
            return
        allowed = tolerance(info.identity) if self._tolerance is None else self._tolerance
        # The comparison is false for a distance that is NaN, which must not pass either.
        if not (distance := self.canary.distance(canary)) <= allowed:
            raise WrongTeacherError(
                f"{url} says it is {info.fingerprint}, but its canary is {distance:.4g} nats a token from the one "
                f"expected, at most {allowed:g} is rounding: its weights are damaged or it is not who it says",
                field="canary", got=distance, limit=allowed,
            )  # fmt: skip

    def _check(self, fingerprint: str, info: ServiceInfo, url: str) -> None:
        severity = compare_fingerprints(fingerprint, info.fingerprint)
        if severity == "same":
            return
        same = self.identity is not None and self.identity.fingerprint == fingerprint
        lines = self.identity.difference(info.identity) if same and self.identity is not None else []
        what = "; ".join(lines) or f"{fingerprint} expected, {info.fingerprint} there"
        if severity == "semantic" or self._refuse_numeric:
            raise WrongTeacherError(
                f"{url} is not the teacher that is expected (\"here\"): {what}",
                field="fingerprint", got=info.fingerprint, limit=fingerprint,
            )  # fmt: skip
        if info.fingerprint not in self._warned:
            self._warned.add(info.fingerprint)
            self._stats.numeric_changes += 1
            log.warning("%s computes with other rounding than the teacher that is expected: %s", url, what)
