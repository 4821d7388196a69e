"""A policy's decisions on their way to the thread that makes batches: by a fixed lag, whatever is made ahead."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from student_trainer.data.mixture import MixtureState
from student_trainer.data.policies.decisions import STATIC, BatchWeights, PolicyState
from student_trainer.data.stream import BatchStream
from student_trainer.settings.data import DataSettings
from tests.mixture_policy import ByLoss
from tests.unit.data.making import inline, opened, texts

SOURCES = {"a": inline(texts(60, 1)), "b": inline(texts(60, 2))}
LOSSES = [{"loss": 4.0 / (step + 1) + 0.1237 * step, "source/a/kl": 0.3 * step} for step in range(20)]


def settings(batches_ahead: int = 4) -> DataSettings:
    return DataSettings(sources=SOURCES, seq_len=32, rows=4, batches_ahead=batches_ahead)


def at_step(step: int, lag: int) -> PolicyState:
    state = PolicyState(ByLoss(), lag)
    for metrics in LOSSES[:step]:
        state = state.observe(metrics)
    return state


def mixed(lag: int, batches_ahead: int, pause_s: float = 0.0, stop_at: int | None = None) -> list[MixtureState]:
    """The states after 12 batches of a loop that learns from one at a time; stopped before update `stop_at`, what a
    checkpoint would hold goes through JSON and a new stream goes on.
    """
    states: list[MixtureState] = []
    policy = PolicyState(ByLoss(), lag)
    with opened(settings(batches_ahead)) as source:
        before = source.initial_state()
        for stop in filter(None, (stop_at, 12)):
            weights = BatchWeights(policy)
            with BatchStream(source, before, weights) as stream:
                while len(states) < stop:
                    _, state = next(stream)
                    states.append(state)
                    time.sleep(pause_s)
                    policy = policy.observe(LOSSES[len(states) - 1])
                    weights.publish(policy)
            saved = json.loads(json.dumps([states[-1].to_json(), policy.to_json()]))
            before = MixtureState.from_json(saved[0])
            policy = PolicyState(ByLoss(), lag).restored(len(states), saved[1])
    return states


@pytest.mark.parametrize("lag", [1, 3, 8])
def test_a_decision_takes_effect_lag_batches_later(lag: int) -> None:
    states = mixed(lag, batches_ahead=2)
    for number, state in enumerate(states):
        if number < lag:
            assert state.weights == {"a": 0.5, "b": 0.5}
        else:
            decided = at_step(number - lag + 1, lag).policy.weights(number - lag)
            assert state.weights == pytest.approx(decided, abs=1e-15)
    assert len({state.weights["a"] for state in states}) == 12 - lag + 1


@pytest.mark.parametrize("batches_ahead", [1, 16])
@pytest.mark.parametrize("pause_s", [0.0, 0.01])
def test_what_is_made_ahead_and_when_changes_nothing(batches_ahead: int, pause_s: float) -> None:
    assert mixed(3, batches_ahead, pause_s) == mixed(3, 4)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 7, 11])
def test_a_stream_resumed_from_json_is_the_one_that_went_on(stop_at: int) -> None:
    assert mixed(3, 4, stop_at=stop_at) == mixed(3, 4)


def test_a_source_gives_its_share_from_the_batch_on_that_the_decision_is_for() -> None:
    """Tokens drawn of `a` between two batches are its weight then, to within a sequence of each source."""
    states = mixed(3, 4)
    for before, after in pairwise(states):
        drawn = [after.sources[i].tokens - before.sources[i].tokens for i in range(2)]
        assert drawn[0] == pytest.approx(after.weights["a"] * sum(drawn), abs=2 * 32)


def test_a_decision_that_is_no_mixture_is_refused() -> None:
    class Negative(ByLoss):
        def weights(self, step: int) -> dict[str, float]:
            return {"a": -1.0, "b": 1.0}

    with pytest.raises(ValueError, match="mixture weights are"):
        PolicyState(Negative(), 1).observe(LOSSES[0])


def test_a_stream_that_waits_for_a_decision_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with opened(settings()) as source:
        stream = BatchStream(source, source.initial_state(), BatchWeights(PolicyState(ByLoss(), 2)))
        next(stream), next(stream)
        asking = threading.Thread(target=lambda: list(stream))
        monkeypatch.setattr(threading, "excepthook", lambda failed: said.append(str(failed.exc_value)))
        asking.start()
        time.sleep(0.05)
        stream.close()
        asking.join(5)
        assert not asking.is_alive() and said == ["the batch stream is closed"]


def test_static_leaves_the_stream_as_it_is_and_nothing_to_keep() -> None:
    given = settings()
    state = PolicyState.of(given).observe(LOSSES[0])
    assert state.to_json() is None and not state.policy.varies and STATIC.to_json() is None
    assert state.policy.weights(0) == {"a": 0.5, "b": 0.5}
    with opened(given) as source, opened(given) as same:
        with BatchStream(source, source.initial_state(), BatchWeights(state)) as stream:
            made = [next(stream) for _ in range(5)]
        state_before = same.initial_state()
        for batch, after in made:
            expected, state_before = same.batch(state_before, state_before.number)
            assert np.array_equal(batch.tokens_BT, expected.tokens_BT) and after == state_before


def test_a_checkpoint_without_a_policy_goes_on_by_its_own_weights() -> None:
    """As those of older trainers are: the first `lag` batches after it are drawn as the last one before."""
    state = PolicyState(ByLoss(), lag=2).restored(7, None)
    weights = BatchWeights(state)
    assert [weights.wait_for(number, threading.Event()) for number in (7, 8)] == [None, None]
    policy = PolicyState(ByLoss(updates=7), 2, step=7).observe(LOSSES[7])
    weights.publish(policy)
    assert weights.wait_for(9, threading.Event()) == pytest.approx(policy.policy.weights(7))
