"""How every service's command begins and ends: with its parent, by exit codes, and quietly. For each `main.py`.

What the user did wrong is one line on stderr.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from teacher_proto.extras import explain_missing
from teacher_proto.process.parent import end_with_parent_if_asked

# When this process began, to a few hundredths of a second: a command imports this first.
BEGAN = time.monotonic()
EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


class QuietEnd:
    """Once made, this process ends with its exit handlers and `code`, and not with what comes behind them: there
    libraries write to stderr what they have not freed, forty lines of it in Triton's case.

    Made before anything registers an exit handler, so that its own is the last. `code` is 1 until it is set.
    """

    def __init__(self, code: int = 1):
        self.code = code
        atexit.register(self._leave)

    def _leave(self) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # whoever read it has gone
                stream.flush()
        os._exit(self.code)


def run_command(program: str, command: Callable[[list[str]], int], arguments: list[str] | None) -> NoReturn:
    """Run `command` and exit with its code; 2 for a ValueError or a library that is not there, 130 for Ctrl-C.

    `arguments` None: those of the process, which then is this command's and nobody else's.
    """
    end = None
    if arguments is None:
        end_with_parent_if_asked()
        end = QuietEnd()
    try:
        code = command(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except ModuleNotFoundError as error:
        print(explain_missing(program, error), file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit as asked:  # argparse: 0 after --help, 2 for a misspelt option
        code = asked.code if isinstance(asked.code, int) else 0
    if end is not None:
        end.code = code
    sys.exit(code)
