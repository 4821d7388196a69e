"""A teacher's targets for a batch, document by document. Made by the sources in `targets`, read by `align`."""

from __future__ import annotations

from dataclasses import dataclass

from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TENSORS, TokenTargets

# Logprobs at the requested temperatures, if these don't follow from those at 1: several teachers mixed at each.
TEMPERED = "tempered_logprobs"
assert TEMPERED not in TENSORS


@dataclass(frozen=True, eq=False)
class BatchTargets:
    """A teacher's targets for a batch, by document; None for one of which no row counts. `spec`: what was requested.

    `attention`: states of every document, if they were requested too.
    """

    documents: tuple[TokenTargets | None, ...]
    spec: TargetSpec
    fingerprint: str
    attention: tuple[AttentionTargets, ...] | None = None

    @property
    def nbytes(self) -> int:
        tokens = sum(targets.nbytes for targets in self.documents if targets is not None)
        return tokens + sum(targets.nbytes for targets in self.attention or ())
