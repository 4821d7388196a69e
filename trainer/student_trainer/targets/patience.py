"""Waiting for a teacher that is gone: never a step without its targets, never for ever, never in silence.

`Patient` asks again until the teacher is back or the limit has passed; `OutageWatch` is what the loop calls while a
step stands still: it says so, saves the run once, and lets a signal through.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from student_trainer.data.batch import Batch
from student_trainer.settings import TeacherSettings
from student_trainer.targets.protocol import Ask, BatchTargets, GatherIds, Targets, TeacherCard
from teacher_proto.errors import TeacherUnavailableError
from teacher_proto.waiting import Waiting

logger = logging.getLogger(__name__)
ASK_AGAIN_S = 0.5
T = TypeVar("T")


class Patient:
    """`Targets` that outlast an outage of those they stand before. TeacherUnavailableError after `give_up_after_s`."""

    def __init__(self, targets: Targets, give_up_after_s: float):
        self._targets = targets
        self._give_up_after_s = give_up_after_s
        self._reason = ""

    async def open(self) -> TeacherCard:
        return await self._targets.open()

    async def head(self) -> bytes:
        return await self._targets.head()

    async def fetch(self, batch: Batch, ask: Ask, gather_ids: GatherIds | None = None) -> BatchTargets:
        return await outlast(
            lambda: self._targets.fetch(batch, ask, gather_ids), self._give_up_after_s, self._note, "teacher"
        )

    def _note(self, reason: str) -> None:
        self._reason = reason

    def outage(self) -> str:
        return self._reason or self._targets.outage()

    def waiting(self) -> Waiting | None:
        return self._targets.waiting()

    async def close(self) -> None:
        await self._targets.close()


async def outlast(
    attempt: Callable[[], Awaitable[T]], give_up_after_s: float, note: Callable[[str], None], who: str
) -> T:
    """What `attempt` gives, tried again while nobody can be asked; `note` hears why, and "" once it is over.

    TeacherUnavailableError after `give_up_after_s`.
    """
    started = time.monotonic()
    while True:
        try:
            answer = await attempt()
        except TeacherUnavailableError as error:
            note(str(error))
            lasted_s = time.monotonic() - started
            if lasted_s >= give_up_after_s:
                raise TeacherUnavailableError(
                    f"no {who} for {lasted_s:.0f} s, teacher.give_up_after_s is {give_up_after_s:g}: "
                    f"the run stops here, and goes on where it was once there is one. Last: {error}"
                ) from error
            await asyncio.sleep(ASK_AGAIN_S)
        else:
            note("")
            return answer


@dataclass
class OutageWatch:
    """Called with the seconds that a step has waited, and how to save the run. `reason` tells what is known."""

    settings: TeacherSettings
    reason: Callable[[], str]
    _waited_s: float = 0.0
    _said: int = 0
    _saved: bool = False

    def __call__(self, waited_s: float, save: Callable[[], None]) -> None:
        if waited_s < self._waited_s:
            self._said, self._saved = 0, False
        self._waited_s = waited_s
        if waited_s >= (self._said + 1) * self.settings.say_every_s:
            self._said = int(waited_s / self.settings.say_every_s)
            # Where the teacher can be reached, the terminal says how far it is.
            if reason := self.reason():
                logger.warning("NO TARGETS FOR %.0f s, TRAINING WAITS: %s", waited_s, reason)
        if waited_s >= self.settings.save_after_s and not self._saved:
            self._saved = True
            save()
