"""500 generated runs of every mixture policy: stopped at some step around a decision and resumed from JSON they decide
the same weights and draw the same batches as straight ones, however many batches are made ahead.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from student_trainer.data import stream
from student_trainer.data.loader import BatchSource
from student_trainer.data.mixture import MixtureState
from student_trainer.data.policies import ado, decisions
from student_trainer.data.policies.decisions import BatchWeights, PolicyState
from student_trainer.data.policies.policy import Sketches
from student_trainer.data.stream import BatchStream
from student_trainer.settings.data import DataSettings
from tests.unit.data.making import inline, opened, texts

NAMES = ("a", "b", "c", "d")
SOURCES: dict[str, Any] = {name: inline(texts(40, number)) for number, name in enumerate(NAMES)}
POLICIES: dict[str, dict[str, Any]] = {
    "excess": {"kept": 0.7},
    "divergence": {"form": "exponentiated", "eta": 3.0, "over": ("a", "c")},
    "ado": {},
    "influence": {"probe": ("a",), "sketch_size": 16, "eta": 40.0},
}
CASES = 500


@dataclass(frozen=True)
class Case:
    policy: str
    interval: int
    lag: int
    stop: int
    steps: int
    seed: int
    ahead: tuple[int, int]  # batches made ahead before the stop, and after it
    weights: tuple[float, ...]


def cases() -> Iterator[Case]:
    draw = random.Random(18)
    for seed in range(CASES):
        policy = draw.choices(list(POLICIES), (3, 3, 1, 3))[0]
        interval = draw.choice([9, 10]) if policy == "ado" else draw.randint(1, 5)
        decisions = draw.randint(1, 2)
        stop = max(1, decisions * interval + draw.randint(-2, 3))
        weights = tuple(draw.choice([0.1, 0.5, 1.0]) for _ in NAMES[1:])
        zero = draw.choice([0.0, 0.3])
        ahead = draw.choice([1, 2, 16]), draw.choice([1, 4, 16])
        yield Case(policy, interval, draw.randint(1, 6), stop, stop + draw.randint(2, 6), seed, ahead, (*weights, zero))


def figures(case: Case, step: int, state: MixtureState) -> tuple[dict[str, float], Sketches | None]:
    """What an update would say: it hangs on the batch that it was made of."""
    drawn = np.random.default_rng([case.seed, step, *(source.tokens for source in state.sources)])
    metrics: dict[str, float] = {"loss": float(drawn.random())}
    for source in state.sources:
        if source.weight > 0 and drawn.random() < 0.9:
            own = f"source/{source.name}"
            metrics[f"{own}/tokens"] = float(drawn.integers(1, 100))
            metrics[f"{own}/student_cross_entropy"] = 2.0 + float(drawn.random()) + 1 / (step + 1)
            metrics[f"{own}/teacher_cross_entropy"] = 1.5 + float(drawn.random())
            metrics[f"{own}/teacher_divergence"] = float(drawn.random())
    by_source = {name: drawn.standard_normal(16).astype(np.float32) for name in NAMES}
    due = (step + 1) % case.interval == 0
    probe = drawn.standard_normal(16).astype(np.float32) if due else None
    sketched = case.policy == "influence" and step % case.interval >= case.interval - 1 - case.interval // 2
    return metrics, Sketches(by_source, probe, float(2 + drawn.random() / 50) if due else None) if sketched else None


def settings_of(case: Case) -> DataSettings:
    mixture: dict[str, Any] = {"policy": case.policy, "lag": case.lag, "update_interval": case.interval}
    if case.policy == "influence":
        mixture["sketch_steps"] = 1 + case.interval // 2
    sources = {
        name: source.model_copy(update={"weight": weight})
        for (name, source), weight in zip(SOURCES.items(), case.weights, strict=True)
    }
    return DataSettings(sources=sources, seq_len=24, rows=2, mixture={**mixture, **POLICIES[case.policy]})  # type: ignore[arg-type]


def trace(case: Case, source: BatchSource, stops: tuple[int, ...]) -> list[tuple[str, str]]:
    """By batch what it is, and after it all that was decided."""
    settings = settings_of(case)
    policy, states = PolicyState.of(settings), []
    before = source.initial_state().with_weights({n: s.weight for n, s in settings.sources.items()})
    lines: list[tuple[str, str]] = []
    for turn, stop in enumerate(stops):
        weights = BatchWeights(policy)
        source.settings = settings.model_copy(update={"batches_ahead": case.ahead[turn % 2]})
        with BatchStream(source, before, weights) as batches:
            while len(lines) < stop:
                batch, state = next(batches)
                metrics, sketches = figures(case, len(lines), state)
                policy = policy.observe(metrics, sketches=sketches)
                weights.publish(policy)
                digest = hashlib.sha256(batch.tokens_BT.tobytes()).hexdigest()
                lines.append((digest, json.dumps([state.to_json(), policy.to_json()])))
                states.append(state)
        saved = json.loads(lines[-1][1])
        before = MixtureState.from_json(saved[0])
        policy = PolicyState.of(settings).restored(len(lines), saved[1])
    return lines


@pytest.mark.parametrize("part", range(10))
def test_a_run_stopped_and_resumed_is_the_straight_one(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stream, decisions):
        monkeypatch.setattr(module, "POLL_S", 0.002)  # closing waits for it
    monkeypatch.setattr(ado, "STARTS", 1)  # a fit is as much a function of its points, and faster
    changed = 0
    with opened(DataSettings(sources=SOURCES, seq_len=24, rows=2)) as source:
        for case in list(cases())[part::10]:
            straight = trace(case, source, (case.steps,))
            assert trace(case, source, (case.stop, case.steps)) == straight, case
            weights = {
                json.dumps([s["weight"] for s in json.loads(line)[0]["sources"].values()]) for _, line in straight
            }
            changed += len(weights) > 1
            for _, line in straight:
                for name, state in json.loads(line)[0]["sources"].items():
                    cap = max(0.8, case.weights[NAMES.index(name)] / sum(case.weights))
                    assert state["weight"] <= cap + 1e-12, (case, name)
    assert changed > 15, "weights have to change, or nothing is tested"
