"""External trackers: Weights & Biases, TensorBoard and Prometheus. Built and used by `logs`.

A tracker may be slow or unreachable. Each has a queue and a thread; what it can't take is dropped and counted.
`metrics.jsonl` has every line regardless.
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
    """Writes metrics somewhere. Used from one thread only."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Feeds a sink, which `open_sink` creates on the tracker's thread."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]):
        self._name, self._open_sink = name, open_sink
        self._queue: queue.Queue[tuple[int, Mapping[str, Any]] | None] = queue.Queue(QUEUE_LINES)
        self.dropped = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Never blocks: if the queue is full, the line is dropped and counted."""
        try:
            self._queue.put_nowait((step, figures))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning("%s takes metrics too slowly: some are dropped; metrics.jsonl has them all", self._name)

    def close(self) -> None:
        """Let the sink take what is queued. Waits at most 20 seconds for space in the queue, and 20 for the thread."""
        try:
            self._queue.put(None, timeout=CLOSE_WITHIN_S)
        except queue.Full:
            self.dropped += self._queue.qsize()
        self._thread.join(CLOSE_WITHIN_S)
        if self._thread.is_alive() or self.dropped:
            logger.warning(
                "%s has not taken all metrics (%d dropped); metrics.jsonl has them", self._name, self.dropped
            )

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            while (item := self._queue.get()) is not None:
                sink.log(*item)
            sink.close()
        except Exception as error:  # trackers' libraries may raise anything; the run must go on
            logger.error("%s failed and gets no more metrics: %r. metrics.jsonl has them all", self._name, error)
            self._drain()

    def _drain(self) -> None:
        """Discard items until the end, so that `close` doesn't wait for this tracker."""
        while self._queue.get() is not None:
            self.dropped += 1


class _Wandb:
    def __init__(self, settings: Settings, run_id: str, folder: Path, mode: Literal["online", "offline"]):
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=settings.logging.project, id=run_id, name=run_id, dir=str(folder), resume="allow",
            mode=mode, config=public(settings),
            # wandb's metadata include the command line, which may hold secrets.
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
    """The trackers in the settings. Warns conspicuously if `logging.wandb` is auto and there is no API key."""
    trackers = []
    mode = settings.logging.wandb
    if mode == "auto" and os.environ.get("WANDB_API_KEY"):
        trackers.append(Tracker("wandb", lambda: _Wandb(settings, run_id, folder, "online")))
    elif mode == "auto":
        logger.warning(
            "\n%s\n  WANDB_API_KEY is not set: nothing of this run is sent to Weights & Biases.\n  Its metrics are "
            "only in %s. Set the key, or set logging.wandb=offline or off.\n%s", "!" * 88, folder, "!" * 88,
        )  # fmt: skip
    elif mode == "offline":
        trackers.append(Tracker("wandb", lambda: _Wandb(settings, run_id, folder, "offline")))
    if settings.logging.tensorboard:
        trackers.append(Tracker("tensorboard", lambda: _TensorBoard(folder)))
    if settings.logging.prometheus_port is not None:
        trackers.append(_prometheus(settings, run_id))
    return trackers


def _prometheus(settings: Settings, run_id: str) -> Tracker:
    """Opened here and not on the tracker's thread, so that a port in use stops the run before it begins."""
    from student_trainer.reporting.prometheus import Exporter

    assert settings.logging.prometheus_port is not None
    host = settings.logging.prometheus_host
    exporter = Exporter(host, settings.logging.prometheus_port, run_id, settings.run.steps)
    logger.info("metrics for Prometheus at http://%s:%d/metrics", host, exporter.port)
    return Tracker("prometheus", lambda: exporter)
