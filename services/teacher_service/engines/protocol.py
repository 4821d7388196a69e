"""What a teacher engine is to the service: one protocol, three engines behind it (vLLM, transformers, scripted).

`app.py` sees nothing else of an engine; `main.py` picks one by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from serving.engine import Job
from teacher_proto.identity import TeacherIdentity
from teacher_proto.requests import Kind, Limits, Query
from teacher_proto.targets import TokenTargets

if TYPE_CHECKING:
    from teacher_service.head_file import HeadFile


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

    async def score(self, job: Job[Query]) -> TokenTargets:
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
