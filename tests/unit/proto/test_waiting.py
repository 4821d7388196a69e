"""What people are told of a wait: `Waiting`'s words and figures, and several services at once."""

from __future__ import annotations

import pytest

from teacher_proto.client.waiting import Waiting
from teacher_proto.process.stage_text import duration


def test_it_says_how_far_how_fast_and_how_long() -> None:
    waiting = Waiting("teacher", tokens_done=312, tokens=4096, tokens_per_second=20.0)
    assert waiting.seconds_left == pytest.approx(189.2)
    assert waiting.describe() == "312 of 4,096 tokens, 20 tokens/s, about 3 min 9 s left"


def test_others_come_first() -> None:
    waiting = Waiting("teacher", tokens_done=0, tokens=100, tokens_ahead=5000, tokens_per_second=8.5)
    assert waiting.describe() == "0 of 100 tokens, 5,000 of other clients first, 8.5 tokens/s, about 10 min 0 s left"


def test_an_unknown_rate_gives_no_time_and_silence_is_told() -> None:
    waiting = Waiting("teacher", tokens_done=0, tokens=100, silent_s=61.0)
    assert waiting.seconds_left is None
    assert waiting.describe() == "0 of 100 tokens, no response for 1 min 1 s"


def test_what_is_all_there_has_no_time_left() -> None:
    waiting = Waiting("teacher", tokens_done=100, tokens=100)
    assert waiting.seconds_left == 0 and waiting.describe() == "100 of 100 tokens"


def test_several_services_take_as_long_as_the_slowest() -> None:
    fast = Waiting("a", tokens_done=50, tokens=150, tokens_per_second=100.0, silent_s=3.0)
    slow = Waiting("b", tokens_done=0, tokens=200, tokens_per_second=10.0, silent_s=1.0)
    both = Waiting.sum_of((fast, None, slow))
    assert both is not None
    assert (both.what, both.tokens_done, both.tokens, both.silent_s) == ("a, b", 50, 350, 1.0)
    assert both.seconds_left == pytest.approx(20.0)
    assert Waiting.sum_of((None, None)) is None and Waiting.sum_of((slow, None)) is slow
    unknown = Waiting.sum_of((fast, Waiting("c", 0, 10)))
    assert unknown is not None and unknown.seconds_left is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
