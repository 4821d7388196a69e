"""How far all requests of a client are together, out of what services report and what has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from teacher_proto.client.call import Call
from teacher_proto.client.replicas import Replica, RetryPolicy, Timing
from teacher_proto.client.waiting import InFlight, waiting_for
from teacher_proto.requests import TargetsRequest
from teacher_proto.wire.responses import Progress


@dataclass
class Clock:
    time: float = 100.0

    def now(self) -> float:
        return self.time


def call_of(clock: Clock, *lengths: int) -> Call[TargetsRequest]:
    request = TargetsRequest(sequences=tuple(np.zeros(length, np.int64) for length in lengths))
    return Call(request, RetryPolicy(), Timing(now=clock.now))


def test_the_last_of_several_requests_at_one_service_decides_how_long_it_takes() -> None:
    clock, replica = Clock(), Replica[Any]("http://a")
    in_flight = InFlight(clock.now)
    calls = [call_of(clock, 100), call_of(clock, 100), call_of(clock, 100)]
    for call in calls:
        in_flight.begin(100).calls = [call]
        call.begin(replica)
    # In the queue: ours, 50 of somebody else's, ours, ours. What is ahead of the last holds our own.
    for call, ahead in zip(calls, (0, 150, 250), strict=True):
        call.reported(Progress(0, 100, ahead, 20.0))
    waiting = in_flight.waiting("a")
    assert waiting is not None
    assert (waiting.tokens, waiting.tokens_done, waiting.tokens_ahead) == (300, 0, 50)
    assert waiting.seconds_left == pytest.approx(350 / 20)
    # What has come of ours since those reports is no longer ahead.
    clock.time += 12
    calls[0].answered(0)
    in_flight.answered(100)
    waiting = in_flight.waiting("a")
    assert waiting is not None and waiting.seconds_left == pytest.approx(250 / 20)
    clock.time += 12
    waiting = in_flight.waiting("a")
    assert waiting is not None and (waiting.tokens_done, waiting.tokens, waiting.silent_s) == (100, 300, 12)


def test_a_service_that_counts_only_others_ahead_is_understood_too() -> None:
    clock, replica = Clock(), Replica[Any]("http://a")
    in_flight = InFlight(clock.now)
    for _ in range(3):
        call = call_of(clock, 100)
        in_flight.begin(100).calls = [call]
        call.begin(replica)
        call.reported(Progress(0, 100, 50, 20.0))
    waiting = in_flight.waiting("a")
    assert waiting is not None and waiting.seconds_left == pytest.approx(300 / 20)


def test_two_replicas_work_side_by_side_and_share_what_is_not_sent_yet() -> None:
    clock = Clock()
    entries, in_flight = [], InFlight(clock.now)
    for name, rate in (("a", 10.0), ("b", 40.0)):
        call = call_of(clock, 100)
        entry = in_flight.begin(100)
        entry.calls = [call]
        call.begin(Replica[Any](f"http://{name}"))
        call.reported(Progress(0, 100, 0, rate))
        entries.append(entry)
    entries.append(in_flight.begin(200))
    waiting = waiting_for("both", entries, clock.time, replicas=2)
    assert (waiting.tokens, waiting.tokens_ahead) == (400, 0)
    # The slower one has its 100 and half of what waits here.
    assert waiting.seconds_left == pytest.approx(200 / 10)


def test_what_waits_here_is_taken_to_wait_for_others_as_what_was_sent_does() -> None:
    clock, replica = Clock(), Replica[Any]("http://a")
    in_flight = InFlight(clock.now)
    sent = call_of(clock, 100)
    in_flight.begin(100).calls = [sent]
    in_flight.begin(50)
    sent.begin(replica)
    sent.reported(Progress(0, 100, 400, 10.0))
    waiting = in_flight.waiting("a")
    # Five of us take turns: a fifth of the rate for 150 tokens.
    assert waiting is not None and waiting.seconds_left == pytest.approx(150 / 2)


def test_a_service_that_reports_nothing_is_timed_by_what_comes() -> None:
    clock, replica = Clock(), Replica[Any]("http://old")
    in_flight = InFlight(clock.now)
    call = call_of(clock, 30, 30, 30, 30)
    in_flight.begin(120).calls = [call]
    call.begin(replica)
    waiting = in_flight.waiting("old")
    assert waiting is not None and waiting.seconds_left is None
    for index in range(2):
        clock.time += 3
        call.answered(index)
        in_flight.answered(30)
    waiting = in_flight.waiting("old")
    assert waiting is not None and waiting.tokens_per_second == pytest.approx(10.0)
    assert waiting.seconds_left == pytest.approx(6.0)


def test_requests_begun_together_are_counted_together_and_later_ones_apart() -> None:
    clock = Clock()
    in_flight = InFlight(clock.now)
    first, second = in_flight.begin(100), in_flight.begin(50)
    in_flight.end(first)
    waiting = in_flight.waiting("a")
    assert waiting is not None and (waiting.tokens_done, waiting.tokens) == (100, 150)
    third = in_flight.begin(7)
    in_flight.end(second)
    waiting = in_flight.waiting("a")
    assert waiting is not None and (waiting.tokens_done, waiting.tokens) == (0, 7)
    in_flight.end(third)
    assert in_flight.waiting("a") is None
