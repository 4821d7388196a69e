"""How a command ends: by its own code, or by a signal that it has obeyed. Called by `stillhouse-train`'s and
`stillhouse-teacher`'s entry points.
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
    """The exit code of `command`; where a signal stopped it, the process ends here, with EXIT_STOPPED.

    So it does where the command failed after a signal: what is made of the exception on its way is no failure.
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
                print(f"{program}: stopped; start it again to go on", file=sys.stderr)
            signals.leave(EXIT_STOPPED if code else 0)
        return code


def hasten_end(code: int) -> None:
    """For a command that is over: a signal from here on ends the process at once, with the code that it would have."""
    global _ended_with
    _ended_with = code
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


def skip_teardown() -> None:
    """To be registered with `atexit` before anything else is, and so called last: after `hasten_end` the process ends
    here. Taking torch's modules down takes seconds on a busy machine, in which a signal would find no handler of ours
    and give the process another code.
    """
    if _ended_with is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.flush()
        os._exit(_ended_with)
