"""The exit code of a command, whether it ends by itself or was stopped by a signal. Called by the entry points of
`stillhouse-train` and `stillhouse-teacher`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from teacher_proto.process.stages import DISPLAY
from teacher_proto.process.stopping import EXIT_STOPPED, SIGNALS, Stop, StopSignals

_ended_with: int | None = None


def stoppable(program: str, command: Callable[[StopSignals], int]) -> int:
    """Run `command` and return its exit code. After a signal the process ends here instead: with EXIT_STOPPED, or with
    0 if the command succeeded all the same.

    An exception after a signal is no failure: a library may have turned `Stop` into an error of its own.
    """
    with StopSignals(program) as signals:
        try:
            code = command(signals)
        except Stop:
            code = EXIT_STOPPED
        except Exception:
            if signals.received is None:
                raise
            code = EXIT_STOPPED
        if signals.received is not None:
            signals.obey()
            DISPLAY.close()
            if code:
                print(f"{program}: stopped; start it again to continue", file=sys.stderr)
            signals.leave(EXIT_STOPPED if code else 0)
        return code


def hasten_end(code: int) -> None:
    """For a command that is done: from here on a signal ends the process at once, with the code it would have had."""
    global _ended_with
    _ended_with = code
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


def skip_teardown() -> None:
    """Register with `atexit` before anything else, so that it is called last: after `hasten_end` the process ends here.
    Tearing down torch's modules takes seconds on a busy machine, during which a signal would meet no handler of ours
    and change the exit code.
    """
    if _ended_with is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.flush()
        os._exit(_ended_with)
