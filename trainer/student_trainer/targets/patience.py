"""Waiting for a teacher that is gone: never a step without its targets, never for ever, never in silence.

`retry_until` asks again until the teacher is back or the limit has passed; `OutageWatch` is what the loop calls while a
step stands still: it says so, saves the run once, and lets a signal through.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from student_trainer.settings import TeacherSettings
from teacher_proto.errors import TeacherUnavailableError

logger = logging.getLogger(__name__)
ASK_AGAIN_S = 0.5
T = TypeVar("T")


async def retry_until(
    attempt: Callable[[], Awaitable[T]], outage_timeout_s: float, note: Callable[[str], None], who: str,
    progress: Callable[[], int] = lambda: 0,
) -> T:  # fmt: skip
    """What `attempt` gives, tried again while nobody can be asked; `note` hears why, and "" once it is over.

    TeacherUnavailableError after `outage_timeout_s` in which `progress`, what has come so far, did not grow.
    """
    started, so_far = time.monotonic(), progress()
    while True:
        try:
            answer = await attempt()
        except TeacherUnavailableError as error:
            note(str(error))
            # Something came since the last failure: the outage is a new one.
            if progress() > so_far:
                started, so_far = time.monotonic(), progress()
            lasted_s = time.monotonic() - started
            if lasted_s >= outage_timeout_s:
                raise TeacherUnavailableError(
                    f"no {who} for {lasted_s:.0f} s, teacher.outage_timeout_s is {outage_timeout_s:g}: "
                    f"the run stops here, and goes on where it was once there is one. Last: {error}"
                ) from error
            await asyncio.sleep(ASK_AGAIN_S)
        else:
            note("")
            return answer


@dataclass
class OutageWatch:
    """Called with the seconds that a step has waited, and how to save the run; None where that takes all ranks, and the
    others wait for this one. `reason` tells what is known.
    """

    settings: TeacherSettings
    reason: Callable[[], str]
    _waited_s: float = 0.0
    _said: int = 0
    _saved: bool = False

    def __call__(self, waited_s: float, save: Callable[[], None] | None) -> None:
        # Another wait than the last: the step came through in between.
        if waited_s < self._waited_s:
            self._said, self._saved = 0, False
        self._waited_s = waited_s
        if waited_s >= (self._said + 1) * self.settings.log_every_s:
            self._said = int(waited_s / self.settings.log_every_s)
            # Where the teacher can be reached, the terminal says how far it is.
            if reason := self.reason():
                logger.warning("NO TARGETS FOR %.0f s, TRAINING WAITS: %s", waited_s, reason)
        if waited_s >= self.settings.save_after_s and not self._saved:
            self._saved = True
            if save is not None:
                save()
            else:
                logger.warning(
                    "the run is saved, by all ranks, when the wait ends or teacher.outage_timeout_s has passed"
                )
