"""Structured logs on stderr, one line per event: JSON for machines, plain text for people. Set up by each command.

Headers, keys, bodies and query strings are never logged. `stage` reports what a service does until it is ready: one
line per stage with its duration, and a line every 10 s while the stage lasts.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import structlog

log = structlog.get_logger("stillhouse.start")
SAY_EVERY_S = 10.0
LogFormat = Literal["json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]


def set_up_logs(form: LogFormat, level: LogLevel) -> None:
    """Send structlog's events, and what libraries log at warning or above, to stderr."""
    number = getattr(logging, level.upper())
    renderer: structlog.typing.Processor
    renderer = structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty()
    )  # fmt: skip
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if form == "json":
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[
        structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer,
    ]))  # fmt: skip
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


@contextmanager
def stage(what: str, **facts: object) -> Iterator[None]:
    """Wrap one stage of a start, in any thread. Logs a line when it succeeds, and one every 10 s while it lasts."""
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
    """Log the line of a stage that was timed elsewhere."""
    log.info("starting", done=what, seconds=round(seconds, 2), **facts)
