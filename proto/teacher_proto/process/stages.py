"""Progress of a command's long steps: a bar in a terminal, elsewhere a line every ten seconds.

    with stage("indexing source 'web'", total=size, unit="MB") as doing:
        doing.done += ...

Used by the trainer and by `stillhouse-teacher fill` and `pack`. A step that is done within a few seconds prints
nothing. All output goes to standard error, from a separate thread, so that it continues while the main thread is in a
native call.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from teacher_proto.process.stage_text import bar_line, duration, shortened

if TYPE_CHECKING:
    from rich.live import Live

FIRST_S, EVERY_S = 4.0, 10.0
BAR_AFTER_S, TICK_S = 1.0, 0.25


def _number(value: float) -> str:
    """A whole number, or one decimal for fractions below 100."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


@dataclass(eq=False)
class Stage:
    """A step that may take long. `done` of `total` units, if that is known; `note` returns more text, and is called
    from another thread. The first plain line comes after `first_s`.
    """

    what: str
    total: float | None = None
    unit: str = ""
    note: Callable[[], str] = str
    first_s: float = FIRST_S
    closing: bool = True  # print a line at its end, if it has printed any
    paced: bool = True  # estimate the time left from the pace so far
    done: float = 0.0
    began: float = field(default_factory=time.monotonic)
    spoken: bool = False
    due: float = 0.0  # time of the next line

    def __post_init__(self) -> None:
        self.due = self.began + self.first_s

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left_s(self) -> float | None:
        """Seconds left at the pace so far; None while that is unknown."""
        if not self.paced or not self.total or not 0 < self.done <= self.total:
            return None
        return self.seconds * (self.total - self.done) / self.done

    def line(self) -> str:
        """All that is known, in one line."""
        left_s, note = self.left_s, self.note()
        known = [
            f"{_number(self.done)} of {_number(self.total)} {self.unit}".rstrip() if self.total else "",
            duration(self.seconds),
            f"about {duration(left_s)} left" if left_s is not None and self.done < (self.total or 0) else "",
        ]
        line = f"{self.what}: {', '.join(filter(None, known))}"
        return f"{line}; {note}" if note else line

    def rows(self, width: int) -> list[Any]:
        """The same for a terminal: one or two rich renderables of at most `width` columns."""
        share = f"{_number(self.done)}/{_number(self.total)} {self.unit}".rstrip() if self.total else ""
        left_s, note = self.left_s, self.note()
        left = "" if left_s is None else f"{duration(left_s)} left"
        rows = [bar_line(width, self.what, self.done, self.total, (duration(self.seconds), share, left))]
        if note:
            rows.append(shortened(f"  {note}", width))
        return rows


class Pinned(Protocol):
    """What stays at the bottom of the terminal while stages come and go: a run's progress bar."""

    def rows(self, width: int) -> list[Any]: ...

    def line(self) -> str | None:
        """The line to print where there is no terminal; None if there is nothing new."""
        ...


class Display:
    """Shows the stages of this process. `shown`: "on" draws a bar, "off" shows nothing, "auto" draws a bar in a
    terminal and prints lines elsewhere. Of several ranks only the first shows anything. `clean` removes from a text
    what must not be shown, such as a password in a URL.
    """

    def __init__(self) -> None:
        self.clean: Callable[[str], str] = str
        self.shown = "auto" if os.environ.get("RANK", "0") == "0" else "off"
        self._stages: list[Stage] = []
        self._pinned: Pinned | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._drawing = threading.Lock()
        self._live: Live | None = None

    @contextmanager
    def stage(self, what: str, total: float | None = None, unit: str = "", **more: Any) -> Iterator[Stage]:
        """See `Stage`. Only stages of the main thread are shown; of nested ones, the innermost."""
        note: Callable[[], str] = more.pop("note", str)
        stage = Stage(self.clean(what), total, unit, note=lambda: self.clean(note()), **more)
        if threading.current_thread() is not threading.main_thread():
            yield stage
            return
        self._stages.append(stage)
        self._start()
        try:
            yield stage
        finally:
            self._stages.remove(stage)
            for outer in self._stages[-1:]:
                outer.due = max(outer.due, time.monotonic() + outer.first_s)
        if stage.closing and self._stage_was_long(stage) and self.shown != "off":
            self.print(f"{stage.what}: done in {duration(stage.seconds)}")

    def pin(self, pinned: Pinned | None) -> None:
        """Keep `pinned` at the bottom of the terminal; None removes it."""
        self._pinned = pinned
        if pinned is not None:
            self._start()

    def print(self, text: str) -> None:
        """Print a line above the bar, if there is one."""
        # rich replaces `sys.stderr` while a bar is drawn, and moves the bar out of the way.
        print(text, file=sys.stderr, flush=True)

    @property
    def draws(self) -> bool:
        return self.shown == "on" or (self.shown == "auto" and sys.__stderr__ is not None and sys.__stderr__.isatty())

    def close(self) -> None:
        """Remove the bar; it comes back with the next stage."""
        self._pinned = None
        with self._drawing:
            live, self._live = self._live, None
            if live is not None:
                live.stop()

    def _stage_was_long(self, stage: Stage) -> bool:
        return stage.spoken or (self.draws and stage.seconds > FIRST_S)

    def _start(self) -> None:
        self._wake.set()
        if self._thread is None and self.shown != "off":
            atexit.register(self.close)  # a bar hides the cursor
            self._thread = threading.Thread(target=self._work, name="terminal", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            with self._drawing:
                stages, pinned = list(self._stages), self._pinned
                if stages or pinned is not None:
                    self._wake.set()
                if self.draws:
                    self._draw(stages, pinned)
                elif self.shown != "off":
                    self._speak(stages, pinned)
            time.sleep(TICK_S)

    def _speak(self, stages: list[Stage], pinned: Pinned | None) -> None:
        now = time.monotonic()
        for stage in stages[-1:]:
            if now >= stage.due:
                stage.spoken, stage.due = True, now + EVERY_S
                self.print(stage.line())
        if pinned is not None and (line := pinned.line()) is not None:
            self.print(line)

    def _draw(self, stages: list[Stage], pinned: Pinned | None) -> None:
        from rich.console import Console, Group
        from rich.live import Live

        long = [stage for stage in stages[-1:] if stage.seconds > BAR_AFTER_S]
        if self._live is None and (long or pinned is not None):
            # Standard output may be redirected to a file, and must stay as it is.
            self._live = Live(
                console=Console(stderr=True, force_terminal=True), auto_refresh=False, transient=True,
                redirect_stdout=False,
            )  # fmt: skip
            self._live.start()
        live = self._live
        if live is None:
            return
        if not long and pinned is None:
            self._live = None
            live.stop()
            return
        width = live.console.width
        rows = [row for part in (*long, *([pinned] if pinned else [])) for row in part.rows(width)]
        live.update(Group(*rows), refresh=True)


DISPLAY = Display()
stage = DISPLAY.stage
