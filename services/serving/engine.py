"""The interface between an engine and the shared parts of a service: start, score jobs, report health, close.

A `Job` is one query on its way through a service; each service's `app.py` makes them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from teacher_proto.identity import TeacherIdentity
from teacher_proto.request_checks import SequenceLimits


class AnyQuery(Protocol):
    """A query about one sequence. `num_tokens` is its weight in the queue; queries with equal `key` have equal
    results."""

    @property
    def tokens_T(self) -> np.ndarray: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def key(self) -> Hashable: ...


class AnyRecord(Protocol):
    """`nbytes` is its size in memory."""

    @property
    def nbytes(self) -> int: ...


QueryT = TypeVar("QueryT", bound=AnyQuery)
RecordT = TypeVar("RecordT", bound=AnyRecord)


@dataclass(frozen=True, eq=False)
class Job(Generic[QueryT]):
    """A validated query to compute, with the id that names it in errors. `urgent` jobs (control traffic) go ahead of
    all others. `fresh` jobs are computed even if a result is already available."""

    query: QueryT
    request_id: str
    urgent: bool = False
    fresh: bool = False


class AnyEngine(Protocol):
    """Jobs run concurrently; the engine batches them as it likes. `identity` and `limits` are known once `start` has
    returned. Cancelling a `score` aborts its work. `tokens_computed` counts every token that went through the model.
    """

    identity: TeacherIdentity

    @property
    def tokens_computed(self) -> int: ...

    @property
    def limits(self) -> SequenceLimits: ...

    async def start(self) -> None:
        """Load the model. ValueError, with what to do, if it can't be served."""
        ...

    async def score(self, job: Any) -> Any:
        """Compute a job that has passed the request's checks. EngineError if that fails, or if the numbers are those of
        a broken model: nothing checks them again before the client does. EngineDeadError if the engine is dead."""
        ...

    async def check(self) -> None:
        """Return if the engine is alive; EngineDeadError with the reason otherwise."""
        ...

    async def close(self) -> None:
        """Release the device and end child processes; safe to call twice."""
        ...
