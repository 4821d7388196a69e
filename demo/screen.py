"""A demo's output on the terminal: lines, and a sign of life while something is running. Used by the demos.

On a terminal the sign of life is a status line; elsewhere a new line is printed before ten seconds have passed in
silence.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")
SILENT_S = 8.0
POLL_S = 0.1


class Screen:
    """The output of one demo. Lines may come from any thread."""

    def __init__(self, console: Console | None = None, silent_s: float = SILENT_S):
        self.console = console or Console(soft_wrap=False)
        self._silent_s, self._said, self._lock = silent_s, time.monotonic(), threading.Lock()

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    def say(self, *what: object, style: str | None = None) -> None:
        """Print text, a table, or a rule, with rich's markup."""
        with self._lock:
            self.console.print(*what, style=style)
            self._said = time.monotonic()

    def title(self, text: str) -> None:
        with self._lock:
            self.console.rule(f"[bold]{text}[/]")
            self._said = time.monotonic()

    def relay(self, line: str) -> None:
        """Print a child's line unchanged."""
        with self._lock:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._said = time.monotonic()

    @contextmanager
    def waiting(self, what: str) -> Iterator[Callable[[str], None]]:
        """A block that waits. It regularly calls the function that is yielded, with the progress so far."""
        began = time.monotonic()
        if not self.is_terminal:
            yield lambda detail: self._line(what, began, detail)
            return
        with self.console.status(what) as status:
            yield lambda detail: status.update(_going(what, began, detail))

    def _line(self, what: str, began: float, detail: str) -> None:
        if time.monotonic() - self._said >= self._silent_s:
            self.say(f"  … {_going(what, began, detail)}", style="dim")

    def until(self, what: str, done: Callable[[], bool], detail: Callable[[], str] = str) -> None:
        """Wait until `done()` is true."""
        with self.waiting(what) as still:
            while not done():
                still(detail())
                time.sleep(POLL_S)

    def background(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on its own thread, so that waiting for it is not silent; returns or raises what it does."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        # A daemon thread, for which a stopped demo does not wait.
        threading.Thread(target=run, daemon=True).start()
        self.until(what, future.done)
        return future.result()


def _going(what: str, began: float, detail: str) -> str:
    return f"{what}: {time.monotonic() - began:.0f} s{', ' if detail else ''}{detail}"
