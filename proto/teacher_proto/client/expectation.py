"""Which teacher a client expects: the identity, fingerprint and canary that every replica is checked against.

A fingerprint covers what a teacher was loaded from; the canary covers what it computes: the logprobs of four fixed
sequences, scored at every connect. The trainer keeps a run's first canary in its checkpoints and gives it to the next
client. Without an expectation, the first teacher that responds sets it. Used by `replica_client.py` and the trainer's
local teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teacher_proto.client.call import ClientStats
from teacher_proto.errors import WrongTeacherError
from teacher_proto.identity import TeacherIdentity, compare_fingerprints
from teacher_proto.info import ServiceInfo, TeacherInfo
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets

log = logging.getLogger(__name__)
LENGTHS = (8, 16, 24, 32)
# Mean absolute difference in logprob that rounding in a dtype explains: with 8 bits of mantissa, a logit of 16 moves by
# 0.06 when a different batch size selects a different kernel.
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
TOLERANCE_16_BIT = 5e-2


@dataclass(frozen=True)
class Canary:
    """The logprobs of the next tokens of the four sequences, concatenated: at most 7 + 15 + 23 + 31 plain floats."""

    logprobs: tuple[float, ...]

    def distance(self, other: Canary) -> float:
        """Mean absolute difference; infinite if the two are not of the same sequences."""
        if len(self.logprobs) != len(other.logprobs):
            return float("inf")
        return float(np.abs(np.subtract(self.logprobs, other.logprobs)).mean())


def canary_request(info: TeacherInfo) -> TargetsRequest | None:
    """The request for the fixed sequences, in this teacher's vocabulary; None if it serves no next_logprob."""
    kind = next((kind for kind in ("score", "top_k") if kind in info.kinds), None)
    if kind is None:
        return None
    sequences = []
    for i, length in enumerate(LENGTHS):
        length = min(length, info.limits.max_sequence_length)
        # Knuth's multiplicative hash scatters the ids over the whole vocabulary.
        scattered = (np.arange(1, length + 1, dtype=np.uint64) + np.uint64(1000 * i)) * np.uint64(2654435761)
        sequences.append(((scattered % np.uint64(2**32)) % np.uint64(info.limits.vocab_size)).astype(np.int64))
    return TargetsRequest(sequences=tuple(sequences), kinds=(kind,), top_k=1, fingerprint=info.fingerprint)


def read_canary(answers: Sequence[TokenTargets]) -> Canary:
    """The canary from the targets of `canary_request`, in order. The last row of a sequence has no next token."""
    rows = [answer.next_logprob[:-1] for answer in answers if answer.next_logprob is not None]
    return Canary(tuple(float(x) for x in np.concatenate(rows)))


def tolerance(identity: TeacherIdentity) -> float:
    """The largest distance between two canaries of the same teacher."""
    dtype = identity.semantic.dtype.removeprefix("torch.")
    exact = dtype in TOLERANCE and identity.semantic.quantization is None
    return TOLERANCE[dtype] if exact else TOLERANCE_16_BIT


class Expectation:
    """Checks teachers. A semantic difference raises WrongTeacherError; a numeric one logs a warning and is counted, or
    raises too with `refuse_numeric_change`."""

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
        """Check a teacher against the fingerprint that a single request names."""
        self._check(fingerprint, info, "the replica")

    def check_canary(self, canary: Canary, info: ServiceInfo, url: str) -> None:
        if self.canary is None:
            self.canary = canary
            return
        allowed = tolerance(info.identity) if self._tolerance is None else self._tolerance
        # Written so that a NaN distance fails.
        if not (distance := self.canary.distance(canary)) <= allowed:
            raise WrongTeacherError(
                f"{url} reports fingerprint {info.fingerprint}, but its canary is {distance:.4g} nats per token from "
                f"the expected one, and rounding explains at most {allowed:g}: its weights are damaged, or it is "
                "another teacher",
                field="canary", got=distance, limit=allowed,
            )  # fmt: skip

    def _check(self, fingerprint: str, info: ServiceInfo, url: str) -> None:
        severity = compare_fingerprints(fingerprint, info.fingerprint)
        if severity == "same":
            return
        same = self.identity is not None and self.identity.fingerprint == fingerprint
        lines = self.identity.difference(info.identity) if same and self.identity is not None else []
        what = "; ".join(lines) or f"expected {fingerprint}, got {info.fingerprint}"
        if severity == "semantic" or self._refuse_numeric:
            raise WrongTeacherError(
                f"{url} is not the expected teacher: {what}",
                field="fingerprint", got=info.fingerprint, limit=fingerprint,
            )  # fmt: skip
        if info.fingerprint not in self._warned:
            self._warned.add(info.fingerprint)
            self._stats.numeric_changes += 1
            log.warning("%s rounds differently from the expected teacher: %s", url, what)
