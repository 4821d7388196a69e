"""Batches in order from a given state on, prepared ahead on a thread. Built by `build`, used by target prefetching."""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from student_trainer.batch.batch import Batch
from student_trainer.data.loader import BatchSource
from student_trainer.data.mixture import MixtureState
from student_trainer.data.policies.decisions import BatchWeights

logger = logging.getLogger(__name__)
WINDOW = 32  # batches over which waiting is measured
TOO_MUCH = 0.05  # fraction of time spent waiting above which a warning is logged
WARN_EVERY_S = 300.0
POLL_S = 0.2
Made = tuple[Batch, MixtureState, float]  # the last: seconds of waiting for the decision about its weights


@dataclass(frozen=True)
class StreamStats:
    """Over the last WINDOW batches, except `tokens_per_second_worker` and `skipped`, which are over the run."""

    batches: int
    wait_share: float  # fraction of the time between two batches that is spent waiting for data
    tokens_per_second: float  # tokens consumed
    tokens_per_second_worker: float  # tokens that one worker thread makes per second of its CPU time
    fill_rate: float
    skipped: dict[str, int]  # bad documents so far, for each source that has any


class BatchStream:
    """An iterator of (batch, state after it). Close it, or use it in a `with`. `weights`: for an adaptive mixture."""

    def __init__(self, source: BatchSource, state: MixtureState, weights: BatchWeights | None = None) -> None:
        self._source, self._weights = source, weights
        self._queue: queue.Queue[Made | Exception] = queue.Queue(source.settings.batches_ahead)
        self._stop = threading.Event()
        self._window: deque[tuple[float, float, int, float]] = deque(maxlen=WINDOW)  # waited, whole, tokens, fill
        self._last: float | None = None
        self._warned: float | None = None
        source.check_state(state)
        self._thread = threading.Thread(target=self._work, args=(state,), name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Batch, MixtureState]]:
        return self

    def __next__(self) -> tuple[Batch, MixtureState]:
        asked = time.monotonic()
        made = self._get()
        if isinstance(made, Exception):
            self.close()
            raise made
        batch, state, undecided_s = made
        self._measure(asked, batch, undecided_s)
        return batch, state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread. Prepared batches are dropped; the state says where to begin again."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def stats(self) -> StreamStats:
        """The data's statistics for the log line."""
        waited, whole, tokens, fill = (
            (sum(column) for column in zip(*self._window, strict=True)) if self._window else (0.0,) * 4
        )
        count = len(self._window)
        return StreamStats(
            batches=count,
            wait_share=waited / whole if whole else 0.0,
            tokens_per_second=tokens / whole if whole else 0.0,
            tokens_per_second_worker=self._source.rate.tokens_per_second,
            fill_rate=fill / count if count else 0.0,
            skipped=self._source.skipped,
        )

    def _work(self, state: MixtureState) -> None:
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                if self._weights is not None and (weights := self._weights.wait_for(state.number, self._stop)):
                    state = state.with_weights(weights)
                # Waiting for a decision of the training thread doesn't count as waiting for data.
                undecided_s = time.monotonic() - began
                batch, state = self._source.batch(state, state.number)
                self._put((batch, state, undecided_s))
        except Exception as error:  # re-raised in `__next__`: here it would only end the thread
            self._put(error)

    def _get(self) -> Made | Exception:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=POLL_S)
        raise ValueError("the batch stream is closed")

    def _put(self, item: Made | Exception) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=POLL_S)
                return

    def _measure(self, asked: float, batch: Batch, undecided_s: float) -> None:
        now = time.monotonic()
        if self._last is not None:
            fill = batch.fill_rate
            waited = max(0.0, now - asked - undecided_s)
            self._window.append((waited, now - self._last, int(fill * batch.tokens_BT.size), fill))
        self._last = now
        if len(self._window) == WINDOW and (self._warned is None or now - self._warned > WARN_EVERY_S):
            stats = self.stats()
            if stats.wait_share > TOO_MUCH:
                self._warned = now
                logger.warning(*_cannot_keep_ahead(stats, self._source.settings.workers))


def _cannot_keep_ahead(stats: StreamStats, workers: int) -> tuple[str, float, float, int, float]:
    return (
        "data loading is too slow: %.0f %% of the time is spent waiting for data, at %.0f tokens/s. "
        "%d workers tokenise %.0f tokens/s each. Increase data.workers if cores are free, or tokenise beforehand "
        "(format: tokens).",
        100 * stats.wait_share,
        stats.tokens_per_second,
        workers,
        stats.tokens_per_second_worker,
    )
