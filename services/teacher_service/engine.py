"""What a teacher engine is to the service: one protocol, three engines behind it (vLLM, transformers, scripted).

`app.py` sees nothing else of an engine; `main.py` picks one by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from teacher_proto.identity import TeacherIdentity
from teacher_proto.requests import Kind, Limits, TargetSpec
from teacher_proto.targets import TokenTargets

if TYPE_CHECKING:
    from teacher_service.head_file import HeadFile


@dataclass(frozen=True, eq=False)
class Job:
    """One checked sequence to score: token ids [T], the rows [start, stop) wanted, what is wanted of them. `urgent`:
    ahead of all that is not, which is for control traffic. `fresh`: computed, whatever answer is at hand."""

    tokens_T: np.ndarray
    rows: tuple[int, int]
    spec: TargetSpec
    request_id: str
    gather_ids_RG: np.ndarray | None = None
    urgent: bool = False
    fresh: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def key(self) -> Hashable:
        """Equal for jobs with equal answers: token ids, rows, what is asked of them."""
        gathered = b"" if self.gather_ids_RG is None else hashlib.sha256(self.gather_ids_RG.tobytes()).digest()
        return hashlib.sha256(self.tokens_T.tobytes()).digest(), self.rows, self.spec, gathered


class Engine(Protocol):
    """Scores sequences. Jobs run side by side, urgent ones first; the engine batches as it likes.

    `identity`, `limits` and `kinds` are known once `start` has returned. Cancelling a `score` aborts its work.
    `tokens_computed` counts every token that went through the model.
    """

    identity: TeacherIdentity
    limits: Limits
    kinds: tuple[Kind, ...]

    @property
    def tokens_computed(self) -> int: ...

    async def start(self) -> None:
        """Load the model. ValueError with what to do if it can't be served."""
        ...

    async def score(self, job: Job) -> TokenTargets:
        """The targets of a job that `check_request` has passed. EngineError, or EngineDeadError if none can come."""
        ...

    async def check(self) -> None:
        """Return if the engine lives; EngineDeadError with the reason otherwise."""
        ...

    def head(self) -> HeadFile:
        """The output head, read as it is sent. Asked for only where `hidden` is in `kinds`."""
        ...

    async def close(self) -> None:
        """Give back the device and end child processes; safe to call twice."""
        ...
