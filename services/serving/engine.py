"""What an engine is to the parts of a service that both have: something that starts, answers jobs, lives and dies.

A `Job` is a query on its way through a service. Made by each service's `app.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from teacher_proto.identity import TeacherIdentity
from teacher_proto.request_checks import SequenceLimits


class AnyQuery(Protocol):
    """What is asked about one sequence. `num_tokens` is what it weighs in a queue; queries of equal `key` have equal
    answers."""

    @property
    def tokens_T(self) -> np.ndarray: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def key(self) -> Hashable: ...


class AnyAnswer(Protocol):
    """`nbytes` is what it takes in memory."""

    @property
    def nbytes(self) -> int: ...


QueryT = TypeVar("QueryT", bound=AnyQuery)
AnswerT = TypeVar("AnswerT", bound=AnyAnswer)


@dataclass(frozen=True, eq=False)
class Job(Generic[QueryT]):
    """A checked query to compute, with the id that names it in errors. `urgent`: ahead of all that is not, which is for
    control traffic. `fresh`: computed, whatever answer is at hand."""

    query: QueryT
    request_id: str
    urgent: bool = False
    fresh: bool = False


class AnyEngine(Protocol):
    """Jobs run side by side; the engine batches as it likes. `identity` and `limits` are known once `start` has
    returned. Cancelling a `score` aborts its work. `tokens_computed` counts every token that went through the model.
    """

    identity: TeacherIdentity

    @property
    def tokens_computed(self) -> int: ...

    @property
    def limits(self) -> SequenceLimits: ...

    async def start(self) -> None:
        """Load the model. ValueError with what to do if it can't be served."""
        ...

    async def score(self, job: Any) -> Any:
        """The answer to a job that has passed the request's checks. EngineError if none can come, or one that only a
        broken model computes: nobody behind it looks at its numbers again before the client. EngineDeadError."""
        ...

    async def check(self) -> None:
        """Return if the engine lives; EngineDeadError with the reason otherwise."""
        ...

    async def close(self) -> None:
        """Give back the device and end child processes; safe to call twice."""
        ...
