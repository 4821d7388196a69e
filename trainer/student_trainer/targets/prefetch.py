"""Fetches the targets of the next batches ahead of the step and hands them over in order. Used by `loop`.

    prefetch = Prefetch(stream, steps, targets, specs, thread, prepare, refuse, settings)
    ready = prefetch.next(while_waiting)

With depth D, D batches are in flight besides the one that the step works on; at depth 0 a batch is requested when the
step asks for it. Batches keep the stream's order whichever targets arrive first, so a run's metrics do not depend on
depth or latency. Nothing is read or requested past the last of `steps`: a run that is later given more steps continues
from the state after its last batch, and no rollout is written for a step that the run does not have
(`RolloutStream.write`).

The stream also prepares batches ahead, on its own thread (`data.stream`). Its queue is limited in batches, this one in
targets. Between the two, the student may have to write a batch first.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

from student_trainer.batch.batch import Batch, Kind
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.data.mixture import MixtureState
from student_trainer.settings import PrefetchSettings
from student_trainer.targets.background import EventThread
from student_trainer.targets.protocol import Targets
from student_trainer.targets.queries import queries_of
from teacher_proto.errors import InvalidTargetsError
from teacher_proto.requests import TargetSpec

POLL_S = 0.2
WINDOW, START = 64, 2  # depth `auto`: batches that it looks back at, and its first depth


@dataclass(frozen=True, eq=False)
class Ready:
    """A batch to train on. `state`: the mixture's state after it. `latency_s`: time from the request for its targets
    until it was ready. `waited_s`: how long the step waited for it.
    """

    batch: Batch
    state: MixtureState
    targets: BatchTargets | None
    micro: tuple[MicroBatch, ...]
    latency_s: float = 0.0
    waited_s: float = 0.0


# A rollout that is not written yet is a future, so that later batches need not wait for it.
Stream = Iterator[tuple[Batch | Future[Batch], MixtureState]]
# The spec requested for a batch of each kind; None: nothing.
Specs = Mapping[Kind, TargetSpec | None]
Prepare = Callable[[Batch, BatchTargets | None], tuple[MicroBatch, ...]]
# Dumps a batch with invalid targets, and returns the error to raise.
Refuse = Callable[[Batch, BatchTargets | None, InvalidTargetsError], InvalidTargetsError]


class Prefetch:
    """Close it, or use it in a `with`. `steps`: the maximum number of calls of `next`. `targets`: None in a run without
    a teacher.
    """

    def __init__(
        self, stream: Stream, steps: int, targets: Targets | None, specs: Specs, thread: EventThread, prepare: Prepare,
        refuse: Refuse, settings: PrefetchSettings,
    ):  # fmt: skip
        self._stream, self._steps, self._targets, self._specs = stream, steps, targets, specs
        self._thread, self._prepare, self._refuse = thread, prepare, refuse
        self.control = DepthControl(settings)
        self._room = threading.Condition()
        self._calls = 0
        self._started = 0
        self._made: deque[Future[Ready]] = deque()
        self._under_way: set[Future[Ready]] = set()
        self._closed = False
        self._last_handover: float | None = None
        self._reader = threading.Thread(target=self._read, name="prefetch", daemon=True)
        self._reader.start()

    def next(self, while_waiting: Callable[[float], None] = lambda waited_s: None) -> Ready:
        """The next batch in order. `while_waiting(seconds so far)` is called every 0.2 s and may raise to give up.

        Raises what reading the data or fetching the targets raised.
        """
        requested_at = time.monotonic()
        with self._room:
            self._calls += 1
            assert self._calls <= self._steps, "more steps than were announced"
            self._room.notify_all()
        future: Future[Ready] | None = None
        # Polled, so that `while_waiting` can log the wait and give up on a signal.
        while future is None or not future.done():
            if future is None:
                future = self._head()
            else:
                wait([future], timeout=POLL_S)
            if future is None or not future.done():
                while_waiting(time.monotonic() - requested_at)
        ready = future.result()
        now = time.monotonic()
        waited_s = now - requested_at
        busy_s = requested_at - self._last_handover if self._last_handover is not None else None
        self._last_handover = now
        self.control.observe(ready.latency_s, busy_s, ready.targets.nbytes if ready.targets else 0)
        return replace(ready, waited_s=waited_s)

    def close(self) -> None:
        """Stop reading and cancel everything in flight. Safe to call twice."""
        with self._room:
            self._closed = True
            under_way = list(self._under_way)
            self._room.notify_all()
        for future in under_way:
            future.cancel()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _head(self) -> Future[Ready] | None:
        """The oldest batch in flight; None if the reader has started none within `POLL_S`."""
        with self._room:
            if not self._made:
                self._room.wait(POLL_S)
            return self._made.popleft() if self._made else None

    def _read(self) -> None:
        """Pull batches from the stream as there is room, on one thread and in order."""
        while self._wait_for_room():
            try:
                # Only this thread reads, so batches come in the order of their numbers.
                batch, state = next(self._stream)
            except Exception as error:  # re-raised in `next`: here it would only end the thread
                failed: Future[Ready] = Future()
                failed.set_exception(error)
                self._append(failed)
                return
            if not self._closed:
                self._append(self._thread.submit(self._make(batch, state)))

    def _wait_for_room(self) -> bool:
        with self._room:
            # `_calls` batches have been requested by steps; `depth` more may be in flight, up to the run's last.
            while not self._closed and self._started >= min(self._calls + self.control.depth, self._steps):
                self._room.wait()
            self._started += 1
            return not self._closed

    def _append(self, future: Future[Ready]) -> None:
        with self._room:
            self._made.append(future)
            self._under_way.add(future)
            self._room.notify_all()
            closed = self._closed
        future.add_done_callback(self._under_way.discard)
        if closed:
            future.cancel()

    async def _make(self, item: Batch | Future[Batch], state: MixtureState) -> Ready:
        # A rollout may take a while; later batches are fetched meanwhile.
        batch = await asyncio.wrap_future(item) if isinstance(item, Future) else item
        start = time.monotonic()
        targets = None
        loop = asyncio.get_running_loop()
        try:
            if self._targets is not None and (spec := self._specs[batch.kind]) is not None:
                targets = await self._targets.fetch(batch, queries_of(batch, spec))
            # Off the event loop: alignment is numpy work on megabytes, which would delay requests.
            micro = await loop.run_in_executor(None, self._prepare, batch, targets)
        except InvalidTargetsError as error:
            raise (await loop.run_in_executor(None, self._refuse, batch, targets, error)) from error
        return Ready(batch, state, targets, micro, time.monotonic() - start)


class DepthControl:
    """`depth` is the number of batches in flight besides the one in use.

    `auto` covers the 90th percentile of the latency, plus one batch for jitter. If the teacher's throughput is too low,
    latency grows with the number of requests, so the depth is at most four times what the lowest latency of the window
    needs. It also keeps targets within `max_bytes`, assuming the size of the largest batch so far.
    """

    def __init__(self, settings: PrefetchSettings):
        self._settings = settings
        self._latencies: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._largest = 0
        self.depth = START if settings.depth == "auto" else settings.depth

    def observe(self, latency_s: float, step_s: float | None, nbytes: int) -> None:
        """Record a handed-over batch: its latency, the duration of the step before it, and its size in bytes."""
        self._latencies.append(latency_s)
        self._largest = max(self._largest, nbytes)
        if step_s is not None:
            self._steps.append(step_s)
        if self._settings.depth == "auto" and self._steps:
            self.depth = self._wanted()

    def _wanted(self) -> int:
        # The median, so that an evaluation or a save between two steps doesn't count as a slow step.
        step_s = max(sorted(self._steps)[len(self._steps) // 2], 1e-3)
        latencies = sorted(self._latencies)
        # A batch arrives `latency` after its request, so latency / step duration batches must be in flight.
        covering = math.ceil(latencies[int(0.9 * (len(latencies) - 1))] / step_s) + 1
        # The lowest latency is that of an idle teacher; beyond four times that depth we would wait in our own queue.
        unloaded = math.ceil(latencies[0] / step_s)
        # Every batch is assumed to be as large as the largest so far.
        by_bytes = self._settings.max_bytes // self._largest if self._largest else self._settings.max_depth
        return max(1, min(covering, 4 * unloaded + 1, by_bytes, self._settings.max_depth))
