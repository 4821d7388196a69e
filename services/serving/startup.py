"""What a service does until it is ready, said as it goes: a line a stage with its seconds, and while one lasts, that
it does. Used by engines while they start, and by `run.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

log = structlog.get_logger("stillhouse.start")
SAY_EVERY_S = 10.0


@contextmanager
def stage(what: str, **facts: object) -> Iterator[None]:
    """Around one stage of a start, in any thread. Its line comes at its end, and one every 10 s while it lasts."""
    began, over = time.monotonic(), threading.Event()

    def say_that_it_lasts() -> None:
        while not over.wait(SAY_EVERY_S):
            log.info("starting", still=what, seconds=round(time.monotonic() - began, 1), **facts)

    threading.Thread(target=say_that_it_lasts, name="start-stage", daemon=True).start()
    try:
        yield
    finally:
        over.set()
    done(what, time.monotonic() - began, **facts)


def done(what: str, seconds: float, **facts: object) -> None:
    """The line of a stage that somebody else has timed."""
    log.info("starting", done=what, seconds=round(seconds, 2), **facts)
