"""What an engine is to the parts of a service that both have: something that starts, answers jobs, lives and dies."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol, TypeVar

from teacher_proto.identity import TeacherIdentity
from teacher_proto.request_checks import SequenceLimits


class AnyJob(Protocol):
    """One checked sequence. `num_tokens` is what it weighs in a queue; jobs of equal `key` have equal answers; an
    `urgent` one is computed before all that are not, a `fresh` one is computed whatever is at hand."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def key(self) -> Hashable: ...
    @property
    def request_id(self) -> str: ...
    @property
    def urgent(self) -> bool: ...
    @property
    def fresh(self) -> bool: ...


class AnyAnswer(Protocol):
    """`nbytes` is what it takes in memory."""

    @property
    def nbytes(self) -> int: ...


JobT = TypeVar("JobT", bound=AnyJob)
AnswerT = TypeVar("AnswerT", bound=AnyAnswer)


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
        """The answer to a job that has passed the request's checks. EngineError, EngineDeadError if none can come."""
        ...

    async def check(self) -> None:
        """Return if the engine lives; EngineDeadError with the reason otherwise."""
        ...

    async def close(self) -> None:
        """Give back the device and end child processes; safe to call twice."""
        ...
