"""Four fixed sequences that a client has scored at every connect: catches a teacher that says who it is and is not.

A fingerprint covers what a teacher was loaded from; the canary covers what it computes. The trainer keeps a run's
first canary in its checkpoints and hands it to the next client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teacher_proto.identity import TeacherIdentity
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets

LENGTHS = (8, 16, 24, 32)
# Mean absolute difference in logprob that the rounding of a dtype explains: with 8 bits of mantissa a logit of 16
# moves by 0.06 when a batch of another size takes another kernel.
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
TOLERANCE_16_BIT = 5e-2


@dataclass(frozen=True)
class Canary:
    """The logprobs of the four sequences' own next tokens, one after the other: 4 + ... + 31 numbers, plain floats."""

    logprobs: tuple[float, ...]

    def distance(self, other: Canary) -> float:
        """Mean absolute difference; infinite where the two are not of the same sequences."""
        if len(self.logprobs) != len(other.logprobs):
            return float("inf")
        return float(np.abs(np.subtract(self.logprobs, other.logprobs)).mean())


def canary_request(info: TeacherInfo) -> TargetsRequest | None:
    """The fixed sequences for a vocabulary of this size; None for a teacher that gives no next_logprob."""
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
    """The canary out of the answers to `canary_request`, in order; a sequence's last row predicts nothing known."""
    rows = [answer.next_logprob[:-1] for answer in answers if answer.next_logprob is not None]
    return Canary(tuple(float(x) for x in np.concatenate(rows)))


def tolerance(identity: TeacherIdentity) -> float:
    """How far apart two canaries of one teacher may lie."""
    dtype = identity.semantic.dtype.removeprefix("torch.")
    exact = dtype in TOLERANCE and identity.semantic.quantization is None
    return TOLERANCE[dtype] if exact else TOLERANCE_16_BIT
