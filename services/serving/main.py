"""How every service's command ends: what the user did wrong as one line on stderr, exit codes. For each `main.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def run_command(program: str, command: Callable[[list[str]], int], arguments: list[str]) -> NoReturn:
    """Run `command` and exit with its code; 2 for a ValueError, 130 for Ctrl-C."""
    try:
        code = command(arguments)
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)
