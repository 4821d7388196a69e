"""Waiting for an unreachable teacher: no step runs without targets, and the wait is logged and limited in time.

`retry_until` retries until the teacher is back or the limit has passed; `remote` and `attention` call it. `guard` calls
`OutageWatch` while a step waits: it logs the wait and saves the run once.
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
    """The result of `attempt`, retried while no teacher is available. `note` is called with the reason, and with ""
    once the outage is over.

    TeacherUnavailableError after `outage_timeout_s` in which `progress`, the number of results so far, did not grow.
    """
    started, so_far = time.monotonic(), progress()
    while True:
        try:
            answer = await attempt()
        except TeacherUnavailableError as error:
            note(str(error))
            # There were results since the last failure, so this is a new outage.
            if progress() > so_far:
                started, so_far = time.monotonic(), progress()
            lasted_s = time.monotonic() - started
            if lasted_s >= outage_timeout_s:
                raise TeacherUnavailableError(
                    f"no {who} for {lasted_s:.0f} s (teacher.outage_timeout_s is {outage_timeout_s:g}): "
                    f"stopping the run; start it again to resume. Last error: {error}"
                ) from error
            await asyncio.sleep(ASK_AGAIN_S)
        else:
            note("")
            return answer


@dataclass
class OutageWatch:
    """Called with the seconds that a step has waited and a function that saves the run. The latter is None with several
    ranks, since a save needs them all. `reason` returns the reason for the outage.
    """

    settings: TeacherSettings
    reason: Callable[[], str]
    _waited_s: float = 0.0
    _said: int = 0
    _saved: bool = False

    def __call__(self, waited_s: float, save: Callable[[], None] | None) -> None:
        # A new wait: the previous one ended in between.
        if waited_s < self._waited_s:
            self._said, self._saved = 0, False
        self._waited_s = waited_s
        if waited_s >= (self._said + 1) * self.settings.log_every_s:
            self._said = int(waited_s / self.settings.log_every_s)
            # While the teacher is reachable there is no reason to log: the progress line shows how far it is.
            if reason := self.reason():
                logger.warning("no targets for %.0f s, training is waiting: %s", waited_s, reason)
        if waited_s >= self.settings.save_after_s and not self._saved:
            self._saved = True
            if save is not None:
                save()
            else:
                logger.warning("all ranks will save the run when the wait ends or teacher.outage_timeout_s has passed")
