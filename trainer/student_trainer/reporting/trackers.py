"""Trackers of others: Weights & Biases, TensorBoard and Prometheus. Built by `build`, fed by `logs`.

A tracker may be slow, down or gone: it is fed from a queue by a thread of its own, and what it can't take is counted
and dropped. `metrics.jsonl` has every line whatever happens here.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any, Literal, Protocol

from student_trainer.settings import Settings
from student_trainer.settings.redact import public, redact

logger = logging.getLogger(__name__)
QUEUE_LINES = 10_000
CLOSE_WITHIN_S = 20.0


class Sink(Protocol):
    """What writes figures somewhere. Lives on one thread."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Feeds a sink that `open_sink` makes on the tracker's thread."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]):
        self._name, self._open_sink = name, open_sink
        self._queue: queue.Queue[tuple[int, Mapping[str, Any]] | None] = queue.Queue(QUEUE_LINES)
        self.dropped = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Never waits: a line that finds the queue full is dropped and counted."""
        try:
            self._queue.put_nowait((step, figures))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning("%s takes figures too slowly: some are dropped, metrics.jsonl has them all", self._name)

    def close(self) -> None:
        """Give the sink what is queued, but no more than 20 seconds."""
        try:
            self._queue.put(None, timeout=CLOSE_WITHIN_S)
        except queue.Full:
            self.dropped += self._queue.qsize()
        self._thread.join(CLOSE_WITHIN_S)
        if self._thread.is_alive() or self.dropped:
            logger.warning(
                "%s has not taken all figures (%d dropped); metrics.jsonl has them", self._name, self.dropped
            )

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            while (item := self._queue.get()) is not None:
                sink.log(*item)
            sink.close()
        except Exception as error:  # the edge of a thread that runs other people's code
            logger.error("%s FAILED AND GETS NOTHING MORE: %r. metrics.jsonl has every line", self._name, error)
            self._drain()

    def _drain(self) -> None:
        """Take what comes until the end, so that nobody waits for this tracker."""
        while self._queue.get() is not None:
            self.dropped += 1


class _Wandb:
    def __init__(self, settings: Settings, run_id: str, folder: Path, mode: Literal["online", "offline"]):
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=settings.logging.project, id=run_id, name=run_id, dir=str(folder), resume="allow",
            mode=mode, config=public(settings),
            # Of the process it would keep the command line too, whatever is in it.
            settings=wandb.Settings(console="off", x_disable_meta=any(redact(word) != word for word in sys.argv)),
        )  # fmt: skip

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        self._run.log({name: self._shown(value) for name, value in figures.items()}, step=step)

    def _shown(self, value: Any) -> Any:
        return (
            self._html(f"<pre style='white-space: pre-wrap'>{escape(value)}</pre>") if isinstance(value, str) else value
        )

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
            elif isinstance(value, str):
                self._writer.add_text(name, value, step)

    def close(self) -> None:
        self._writer.close()


def open_trackers(settings: Settings, run_id: str, folder: Path) -> list[Tracker]:
    """The trackers that the settings ask for; says very loudly if there is no online one and none was refused."""
    trackers = []
    mode = settings.logging.wandb
    if mode == "auto" and os.environ.get("WANDB_API_KEY"):
        trackers.append(Tracker("wandb", lambda: _Wandb(settings, run_id, folder, "online")))
    elif mode == "auto":
        logger.warning(
            "\n%s\n  WANDB_API_KEY IS NOT SET: NOTHING OF THIS RUN GOES TO WEIGHTS & BIASES.\n  The figures are in "
            "%s alone. Set the key, or say logging.wandb=offline or off.\n%s", "!" * 88, folder, "!" * 88,
        )  # fmt: skip
    elif mode == "offline":
        trackers.append(Tracker("wandb", lambda: _Wandb(settings, run_id, folder, "offline")))
    if settings.logging.tensorboard:
        trackers.append(Tracker("tensorboard", lambda: _TensorBoard(folder)))
    if settings.logging.prometheus_port is not None:
        trackers.append(_prometheus(settings, run_id))
    return trackers


def _prometheus(settings: Settings, run_id: str) -> Tracker:
    """Opened here and not on the tracker's thread: a port that is taken stops the run before it begins."""
    from student_trainer.reporting.prometheus import Exporter

    assert settings.logging.prometheus_port is not None
    host = settings.logging.prometheus_host
    exporter = Exporter(host, settings.logging.prometheus_port, run_id, settings.run.steps)
    logger.info("figures for Prometheus at http://%s:%d/metrics", host, exporter.port)
    return Tracker("prometheus", lambda: exporter)
