"""A checked sequence on its way through the service: what `asking.py` makes and the engine answers."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from teacher_proto.attention import AttentionSpec


@dataclass(frozen=True, eq=False)
class Job:
    """Token ids [T], what is wanted of them, and the positions wanted [r], None for all. `urgent`: ahead of all that
    is not, which is for control traffic. `fresh`: computed, whatever answer is at hand."""

    tokens_T: np.ndarray
    spec: AttentionSpec
    request_id: str
    rows_r: np.ndarray | None = None
    urgent: bool = False
    fresh: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def key(self) -> Hashable:
        """Equal for jobs with equal answers."""
        rows = None if self.rows_r is None else hashlib.sha256(self.rows_r.tobytes()).digest()
        return hashlib.sha256(self.tokens_T.tobytes()).digest(), rows, self.spec
