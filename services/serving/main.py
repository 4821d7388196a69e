"""Runs the command of a service: exit codes, a quiet exit, and ending with the parent process. Used by each `main.py`.

User errors become one line on stderr.
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
from teacher_proto.process.threads import spin_briefly

# When this process began, to within a few hundredths of a second: a command imports this module first.
BEGAN = time.monotonic()
EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


class QuietEnd:
    """Once created, makes this process exit with `code` right after its exit handlers. In what would follow, libraries
    report on stderr what they have not freed; Triton writes forty lines.

    Create it before anything else registers an exit handler, so that its own runs last. `code` is 1 until it is set.
    """

    def __init__(self, code: int = 1):
        self.code = code
        atexit.register(self._leave)

    def _leave(self) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the reader is gone
                stream.flush()
        os._exit(self.code)


def run_command(program: str, command: Callable[[list[str]], int], arguments: list[str] | None) -> NoReturn:
    """Run `command` and exit with its code; 2 for a ValueError or a missing library, 130 for Ctrl-C.

    If `arguments` is None, those of the process are used, and the process is assumed to run nothing else.
    """
    end = None
    spin_briefly()
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
