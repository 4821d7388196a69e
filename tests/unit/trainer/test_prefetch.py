"""Batches ahead of the step: in order whatever comes first, as many as the depth, errors where they belong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.data.mixture import MixtureState
from student_trainer.settings import PrefetchSettings
from student_trainer.targets.background import EventThread
from student_trainer.targets.prefetch import DepthControl, Prefetch
from student_trainer.targets.protocol import Queries
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets
from tests.trainer_run import random_delays

SPEC = TargetSpec(("top_k",), 4)


class Numbered:
    """A batch of the data that is only its number."""

    kind, documents = "data", ()

    def __init__(self, number: int):
        self.number = number


class Counting:
    """Targets that take their time, and count how many fetches run at once."""

    def __init__(self, delay: Any = lambda number: 0.0, fail_at: int | None = None):
        self._delay, self._fail_at = delay, fail_at
        self.running = self.most = 0
        self.begun: list[int] = []

    async def fetch(self, batch: Any, queries: Queries) -> BatchTargets:
        self.begun.append(batch.number)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self._delay(batch.number))
            if batch.number == self._fail_at:
                raise ValueError(f"batch {batch.number} cannot be had")
            return BatchTargets((), SPEC, "")
        finally:
            self.running -= 1


def stream(fail_at: int | None = None) -> Iterator[tuple[Any, MixtureState]]:
    for number in range(10_000):
        if number == fail_at:
            raise OSError(f"the data end before batch {number}")
        yield Numbered(number), MixtureState(number + 1, ())


@pytest.fixture()
def thread() -> Iterator[EventThread]:
    with EventThread() as made:
        yield made


def prefetch(
    thread: EventThread, targets: Any, depth: int | str, source: Any = None, max_bytes: int = 2**30, steps: int = 100
) -> Prefetch:
    settings = PrefetchSettings(depth=depth, max_bytes=max_bytes)  # type: ignore[arg-type]
    return Prefetch(
        source or stream(),
        steps,
        targets,
        {"data": SPEC},
        thread,
        lambda batch, answer: (batch.number,),
        None,
        settings,  # type: ignore[arg-type,return-value]
    )


@pytest.mark.parametrize("depth", [0, 1, 4, 16, "auto"])
def test_batches_come_in_order_with_their_state_whatever_the_delays(thread: EventThread, depth: int | str) -> None:
    with prefetch(thread, Counting(random_delays(3, 0.02)), depth) as ahead:
        for number in range(60):
            ready = ahead.next()
            assert (ready.batch.number, ready.state.number, ready.micro) == (number, number + 1, (number,))


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_no_more_than_depth_batches_are_under_way_beside_the_one_in_use(thread: EventThread, depth: int) -> None:
    targets = Counting(lambda number: 0.005)
    with prefetch(thread, targets, depth) as ahead:
        for number in range(12):
            ahead.next()
            time.sleep(0.01)
            assert max(targets.begun) <= number + depth
    assert targets.most <= depth + 1


@pytest.mark.parametrize("depth", [0, 1, 16, "auto"])
def test_nothing_is_read_or_asked_for_past_the_last_step(thread: EventThread, depth: int | str) -> None:
    targets = Counting()
    with prefetch(thread, targets, depth, stream(fail_at=7), steps=7) as ahead:
        assert [ahead.next().batch.number for _ in range(7)] == list(range(7))
        time.sleep(0.05)
        assert sorted(targets.begun) == list(range(7))


class Heavy(Counting):
    """Answers of a mebibyte each, after far longer than a step takes."""

    async def fetch(self, batch: Any, queries: Queries) -> BatchTargets:
        answered = await super().fetch(batch, queries)
        document = TokenTargets(0, lse=np.zeros(2**18, np.float32))
        return BatchTargets((document,), answered.spec, answered.fingerprint)


@pytest.mark.parametrize("most", [1, 3, 6])
def test_the_bytes_of_targets_ahead_of_the_step_keep_to_their_limit(thread: EventThread, most: int) -> None:
    targets = Heavy(lambda number: 0.03)
    with prefetch(thread, targets, "auto", max_bytes=most * 2**20) as ahead:
        deepest = 0
        for number in range(30):
            assert ahead.next().targets.nbytes == 2**20
            time.sleep(0.003)
            # Before the first answers nobody knows how large they are.
            if number >= 4:
                assert len(targets.begun) - 1 - number <= most
                deepest = max(deepest, len(targets.begun) - 1 - number)
    assert deepest == most, "the latency wants more than the limit allows"


def test_what_becomes_of_targets_happens_off_the_main_thread(thread: EventThread) -> None:
    names = []

    def prepare(batch: Any, answer: BatchTargets) -> tuple[int, ...]:
        names.append(threading.current_thread())
        return (batch.number,)

    settings = PrefetchSettings(depth=2)
    with Prefetch(stream(), 5, Counting(), {"data": SPEC}, thread, prepare, None, settings) as ahead:  # type: ignore[arg-type]
        for _ in range(5):
            ahead.next()
    assert threading.main_thread() not in names


def test_depth_zero_asks_only_when_the_step_does(thread: EventThread) -> None:
    targets = Counting()
    with prefetch(thread, targets, 0) as ahead:
        time.sleep(0.05)
        assert targets.begun == []
        assert ahead.next().batch.number == 0 and targets.begun == [0]


def test_waiting_is_measured_and_hidden_by_depth(thread: EventThread) -> None:
    with prefetch(thread, Counting(lambda number: 0.1), 0) as ahead:
        assert ahead.next().waited_s >= 0.1
    with prefetch(thread, Counting(lambda number: 0.1), 2) as ahead:
        time.sleep(0.5)
        assert ahead.next().waited_s < 0.1


def test_a_failed_fetch_is_raised_in_its_turn_and_not_before(thread: EventThread) -> None:
    with prefetch(thread, Counting(fail_at=3), 8) as ahead:
        assert [ahead.next().batch.number for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="batch 3 cannot be had"):
            ahead.next()


def test_data_that_end_in_an_error_say_so_in_their_turn(thread: EventThread) -> None:
    with prefetch(thread, Counting(), 4, stream(fail_at=2)) as ahead:
        assert [ahead.next().batch.number for _ in range(2)] == [0, 1]
        with pytest.raises(OSError, match="before batch 2"):
            ahead.next()


def test_whoever_waits_can_be_told_and_can_give_up(thread: EventThread) -> None:
    told: list[float] = []

    def while_waiting(waited_s: float) -> None:
        told.append(waited_s)
        if len(told) == 2:
            raise InterruptedError

    with prefetch(thread, Counting(lambda number: 60.0), 1) as ahead, pytest.raises(InterruptedError):
        ahead.next(while_waiting)
    assert 0 < told[0] < told[1] < 5


def test_closing_ends_fetches_that_are_under_way(thread: EventThread) -> None:
    targets = Counting(lambda number: 60.0)
    before = set(threading.enumerate())
    with prefetch(thread, targets, 3) as ahead, pytest.raises(InterruptedError):
        ahead.next(_give_up)
    deadline = time.monotonic() + 30
    while (targets.running or set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert targets.running == 0
    assert not set(threading.enumerate()) - before


def _give_up(waited_s: float) -> None:
    raise InterruptedError


def control(latency_s: float, step_s: float, nbytes: int = 1000, rounds: int = 40, **settings: Any) -> int:
    made = DepthControl(PrefetchSettings(**settings))
    for _ in range(rounds):
        made.observe(latency_s, step_s, nbytes)
    return made.depth


def test_the_depth_covers_the_latency_and_no_more() -> None:
    assert control(0.01, 0.1) == 2
    assert control(0.35, 0.1) == 5
    assert control(3.5, 0.1) == 32
    assert control(3.5, 0.1, max_depth=7) == 7
    assert control(3.5, 0.1, depth=3) == 3


def test_the_depth_keeps_to_its_bytes() -> None:
    assert control(3.5, 0.1, nbytes=2**20, max_bytes=5 * 2**20) == 5
    assert control(3.5, 0.1, nbytes=2**40, max_bytes=2**20) == 1


def test_a_teacher_that_slows_down_under_load_is_not_asked_ever_more() -> None:
    made = DepthControl(PrefetchSettings())
    for _ in range(30):
        # It answers one batch in 0.1 s; the others queue.
        made.observe(0.1 * max(1, made.depth), 0.1, 1000)
        made.observe(0.1, 0.1, 1000)
    assert made.depth <= 5
