"""Waiting for a teacher that is gone: never a step without its targets, never for ever, never in silence.

`Patient` asks again until the teacher is back or the limit has passed; `OutageWatch` is what the loop calls while a
step stands still: it says so, saves the run once, and lets a signal through.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from student_trainer.data.batch import Batch
from student_trainer.settings import TeacherSettings
from student_trainer.targets.protocol import Ask, BatchTargets, GatherIds, Targets, TeacherCard
from teacher_proto.errors import TeacherUnavailableError

logger = logging.getLogger(__name__)
ASK_AGAIN_S = 0.5


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
        started = time.monotonic()
        while True:
            try:
                answer = await self._targets.fetch(batch, ask, gather_ids)
            except TeacherUnavailableError as error:
                self._reason = str(error)
                lasted_s = time.monotonic() - started
                if lasted_s >= self._give_up_after_s:
                    raise TeacherUnavailableError(
                        f"no teacher for {lasted_s:.0f} s, teacher.give_up_after_s is {self._give_up_after_s:g}: "
                        f"the run stops here, and goes on where it was once there is one. Last: {error}"
                    ) from error
                await asyncio.sleep(ASK_AGAIN_S)
            else:
                self._reason = ""
                return answer

    def outage(self) -> str:
        return self._reason or self._targets.outage()

    async def close(self) -> None:
        await self._targets.close()


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
            reason = self.reason() or "the teacher can be reached, its answer has not come"
            logger.warning("NO TARGETS FOR %.0f s, TRAINING WAITS: %s", waited_s, reason)
        if waited_s >= self.settings.save_after_s and not self._saved:
            self._saved = True
            save()
