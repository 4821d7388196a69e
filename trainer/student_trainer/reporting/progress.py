"""A run's progress on the terminal: a bar with rate, losses, waiting and time left, or lines if there is no terminal.

Used by `logs`. Other work in progress, and what a step is waiting for, is shown by `teacher_proto.process.stages`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from student_trainer.losses.metrics import LossMetrics
from student_trainer.reporting.step_metrics import StepMetrics
from teacher_proto.process.stage_text import bar_line, duration, shortened
from teacher_proto.process.stages import DISPLAY, EVERY_S

if TYPE_CHECKING:
    from student_trainer.data.policies.policy import Decision
    from student_trainer.evaluation.records import Metrics

SMOOTHING = 0.9
LINES_A_RUN = 20


class Progress:
    """`shown`: "on" draws a bar, "auto" does if standard error is a terminal, "off" shows nothing. Without a bar, there
    are about 20 lines per run, and one every ten seconds with a new step. `first`: steps made before this process.
    """

    def __init__(self, steps: int, first: int, shown: str):
        self._steps, self._first, self._step = steps, first, first
        self._quiet = shown == "off"
        self._seconds = self._waited = self._rate = 0.0
        self._text = ""
        self._began = self._said_at = self._made_at = time.monotonic()
        self._said = first

    def start(self) -> None:
        self._began = self._said_at = time.monotonic()
        if not self._quiet:
            DISPLAY.pin(self)

    def stop(self) -> None:
        if not self._quiet:
            DISPLAY.close()

    def step(self, step: int, metrics: StepMetrics, seconds: float) -> None:
        self._seconds += seconds
        self._waited += metrics.waited_s
        rate = metrics.losses.tokens / seconds if seconds else 0.0
        self._rate = rate if not self._rate else SMOOTHING * self._rate + (1 - SMOOTHING) * rate
        self._text, self._step, self._made_at = self._figures(metrics.losses), step, time.monotonic()
        often = step == self._steps or step % max(1, self._steps // LINES_A_RUN) == 0
        if not self._quiet and not DISPLAY.draws and often:
            self._said_at, self._said = time.monotonic(), step
            DISPLAY.print(self._line())

    def evaluation(self, step: int, by_source: Mapping[str, Metrics]) -> None:
        if self._quiet:
            return
        for source, figures in by_source.items():
            parts = [f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float)]
            DISPLAY.print(f"held out at step {step}, {source}: {'  '.join(parts)}")

    def decision(self, decision: Decision, lag: int) -> None:
        """Print the new mixture and the reasons."""
        if self._quiet:
            return
        parts = []
        for source, weight in decision.weights.items():
            reasons = ", ".join(f"{name} {value:.4f}" for name, value in decision.reasons.get(source, {}).items())
            parts.append(f"{source} {weight:.3f}{f' ({reasons})' if reasons else ''}")
        note = f"; {decision.note}" if decision.note else ""
        DISPLAY.print(f"mixture from step {decision.step + lag + 1} on: {', '.join(parts)}{note}")

    def line(self) -> str | None:
        """See `stages.Pinned`: a line if steps were made since the last one, and that was ten seconds ago."""
        if self._step == self._said or time.monotonic() - self._said_at < EVERY_S:
            return None
        self._said_at, self._said = time.monotonic(), self._step
        return self._line()

    def rows(self, width: int) -> list[Any]:
        """See `stages.Pinned`: a row with the bar, and one with the metrics."""
        left = f"{self._left()} left" if self._left() else ""
        clock = duration(time.monotonic() - self._began)
        rows = [bar_line(width, "train", self._step, self._steps, (clock, f"{self._step:,}/{self._steps:,}", left))]
        return [*rows, shortened(self._text, width)] if self._text else rows

    def _left(self) -> str:
        """The time left at this process's pace so far, including evaluation and saving."""
        made, left = self._step - self._first, self._steps - self._step
        if not made:
            return ""
        a_step_s, since_s = (self._made_at - self._began) / made, time.monotonic() - self._made_at
        return duration(max(left * a_step_s - since_s, (left - 1) * a_step_s))

    def _line(self) -> str:
        left = f"  {self._left()} left" if self._step < self._steps else ""
        return f"step {self._step}/{self._steps}  {self._text}{left}"

    def _figures(self, metrics: LossMetrics) -> str:
        losses = "  ".join(f"{name} {value:.3f}" for name, value in metrics.terms.items())
        share = self._waited / self._seconds if self._seconds else 0.0
        return f"{losses}  {self._rate:,.0f} tokens/s  waited {share:.0%}"
