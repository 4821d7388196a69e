"""The run on the terminal: a bar with rate, losses, time left and waiting; plain lines where there is no terminal.

Used by `logs` alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from student_trainer.tally import StepFigures

if TYPE_CHECKING:
    from student_trainer.evaluate import Figures

SMOOTHING = 0.9
LINES_A_RUN = 20


class Progress:
    """`shown`: "on", "off", or "auto" for where standard error is a terminal; otherwise a line now and then."""

    def __init__(self, steps: int, first: int, shown: str):
        self.console = Console(stderr=True)
        live = shown == "on" or (shown == "auto" and self.console.is_terminal)
        self._quiet = shown == "off"
        self._steps, self._first = steps, first
        self._bar = Bar(
            TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
        ) if live else None  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=first, figures="") if self._bar else None
        self._seconds = self._waited = self._rate = 0.0

    def start(self) -> None:
        if self._bar:
            self._bar.start()

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int, figures: StepFigures, seconds: float) -> None:
        self._seconds += seconds
        self._waited += figures.waited_s
        rate = figures.tokens / seconds if seconds else 0.0
        self._rate = rate if not self._rate else SMOOTHING * self._rate + (1 - SMOOTHING) * rate
        text = self._text(figures)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, figures=text)
        elif not self._quiet and (step == self._steps or step % max(1, self._steps // LINES_A_RUN) == 0):
            print(f"step {step}/{self._steps}  {text}", file=sys.stderr, flush=True)

    def evaluation(self, step: int, by_source: Mapping[str, Figures]) -> None:
        if self._quiet:
            return
        for source, figures in by_source.items():
            parts = [f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float)]
            self.console.print(f"held out at step {step}, {source}: {'  '.join(parts)}", highlight=False)

    def _text(self, figures: StepFigures) -> str:
        losses = "  ".join(f"{name} {value:.3f}" for name, value in figures.terms.items())
        share = self._waited / self._seconds if self._seconds else 0.0
        return f"{losses}  {self._rate:,.0f} tok/s  waited {share:.0%}"
