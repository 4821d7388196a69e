"""SIGTERM and SIGINT as a wish that the loop grants between two updates. Used by `main` and `loop`."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self


class StopSignals:
    """While entered, the first signal is noted for `check`; a second SIGINT ends the process as it always would."""

    class Stop(Exception):
        """A signal asked for the run's end."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Raise `Stop` if a signal has come."""
        if self.received is not None:
            raise self.Stop(f"{self.received.name} received")

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self.received is signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
