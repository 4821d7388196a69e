"""Structured logs on stderr, a line an event: JSON for machines, plain for people. Set up once by each main.

Headers, keys, bodies and query strings are never passed to a logger.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

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
