"""The stream of batches made ahead: the same batches, errors handed over, and a warning when it starves."""

import logging
import time
from itertools import islice

import pytest

from student_trainer.data import stream as stream_module
from student_trainer.data.stream import BatchStream
from student_trainer.settings.data import DataSettings
from tests.unit.data.making import inline, opened, run, same, texts


def settings(**changes: object) -> DataSettings:
    return DataSettings(**{"sources": {"a": inline(texts(50))}, "seq_len": 64, "rows": 2, **changes})


@pytest.mark.parametrize("ahead", [1, 4, 16])
def test_the_stream_is_the_pure_function_in_order_from_any_state(ahead: int) -> None:
    with opened(settings(batches_ahead=ahead)) as source:
        batches, states = run(source, 20)
        for start in (0, 7):
            with BatchStream(source, states[start]) as stream:
                for number, (batch, after) in enumerate(islice(stream, 13), start):
                    assert same(batch, batches[number]) and after == states[number + 1]


def test_an_error_reaches_whoever_asks_for_the_batch() -> None:
    with opened(settings(sources={"a": inline([""])})) as source:
        stream = BatchStream(source, source.initial_state())
        with pytest.raises(ValueError, match="no document to train on"):
            next(stream)
        with pytest.raises(ValueError, match="closed"):
            next(stream)


def test_a_closed_stream_leaves_no_thread_and_the_source_usable() -> None:
    with opened(settings(batches_ahead=2)) as source:
        stream = BatchStream(source, source.initial_state())
        next(stream)
        stream.close()
        assert not stream._thread.is_alive()
        run(source, 2)


def test_a_state_of_other_data_is_refused_before_the_first_batch() -> None:
    with opened(settings(sources={"b": inline(texts(5))})) as other:
        state = other.initial_state()
    with opened(settings()) as source, pytest.raises(ValueError, match="has the sources"):
        BatchStream(source, state)


def test_starving_is_said_loudly_with_figures_and_plenty_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "WINDOW", 8)
    with opened(settings(batches_ahead=2)) as source, caplog.at_level(logging.WARNING):
        with BatchStream(source, source.initial_state()) as stream:
            for _ in range(12):
                while not stream._queue.full():
                    time.sleep(0.001)
                next(stream)
            stats = stream.stats()
        assert stats.wait_share < 0.5 and 0 < stats.fill_rate <= 1 and stats.tokens_per_second_worker > 0
        assert stats.batches == 8 and stats.skipped == {}
        assert not caplog.records

        quick = source.batch
        monkeypatch.setattr(source, "batch", lambda state, number: time.sleep(0.02) or quick(state, number))
        with BatchStream(source, source.initial_state()) as stream:
            for _ in islice(stream, 12):
                pass
            assert stream.stats().wait_share > 0.5
        assert [
            r.message for r in caplog.records if "data loading is too slow" in r.message and "tokens/s" in r.message
        ]
