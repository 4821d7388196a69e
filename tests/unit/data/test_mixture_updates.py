"""The updates of all mixture policies against worked examples, and the bounds that every decision is within."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from student_trainer.data.policies.updates import (
    averaged_step,
    bounded_step,
    doge_scores,
    exponentiated_step,
    perplexity_ratios,
    tilted,
    within,
)

NAMES = ("prose", "code", "talk")
PRIOR = dict(zip(NAMES, (0.5, 0.3, 0.2), strict=True))
GAPS = dict(zip(NAMES, (2.8 - 2.5, 3.1 - 2.6, 1.9 - 1.85), strict=True))
GRADIENTS = ((1, 0, 2, 0), (0, 1, -1, 1), (0.5, 0.5, 0, -1))
PROBE = (1, 1, 1, 0)
DOTS = {n: float(sum(a * b for a, b in zip(g, PROBE, strict=True))) for n, g in zip(NAMES, GRADIENTS, strict=True)}
NORMS = {n: sum(a * a for a in g) ** 0.5 for n, g in zip(NAMES, GRADIENTS, strict=True)}


def values(weights: dict[str, float]) -> list[float]:
    return [weights[name] for name in NAMES]


def near(*expected: float) -> object:
    return pytest.approx(list(expected), abs=1e-6)  # as given, some cut and not rounded


def test_ddk() -> None:
    assert values(tilted(dict.fromkeys(NAMES, 1.0), perplexity_ratios(GAPS))) == near(0.323605, 0.436324, 0.240071)
    assert values(bounded_step(PRIOR, GAPS, 0.5)) == near(0.404113, 0.358759, 0.237128)


def test_doremi_on_means() -> None:
    assert values(exponentiated_step(PRIOR, GAPS, 1.0, 1e-3)) == near(0.488994, 0.358444, 0.152561)


def test_doge() -> None:
    scores = doge_scores(DOTS, NORMS)
    assert values(scores) == near(1.733147, 0, 0.577716)
    # lr 1e-3 over mu .01
    assert values(averaged_step(PRIOR, scores, 1e-3 / 0.01, 0.0)) == near(0.537381, 0.271122, 0.191497)


def test_dga() -> None:
    assert values(averaged_step(PRIOR, DOTS, 0.1, 0.9)) == near(0.506434, 0.295084, 0.198482)


def test_cosines_averaged() -> None:
    length = sum(x * x for x in PROBE) ** 0.5
    cosines = {name: DOTS[name] / NORMS[name] / length for name in NAMES}
    assert values(cosines) == near(0.774597, 0, 0.471405)
    stepped = averaged_step(PRIOR, cosines, 1.0, 0.9)
    assert values(stepped) == near(0.513617, 0.287592, 0.198791)
    low, high = ({n: part * w for n, w in PRIOR.items()} for part in (0.8, 1.2))
    assert within(stepped, low, high) == pytest.approx(stepped, abs=1e-15), "no bound holds these"


def test_what_constant_gaps_lead_to() -> None:
    """The exponentiated form ends on one source; the bounded one settles, with at most a + (1 - a) / N on any."""
    exponentiated = bounded = PRIOR
    for _ in range(200):
        exponentiated = exponentiated_step(exponentiated, GAPS, 1.0, 1e-3)
        bounded = bounded_step(bounded, GAPS, 0.5)
    assert values(exponentiated) == pytest.approx([0.0018, 0.9972, 0.0009], abs=6e-5)
    assert values(bounded) == pytest.approx([0.3085, 0.4385, 0.2529], abs=6e-5)
    assert max(bounded.values()) <= 0.5 + 0.5 / 3


def test_noise_without_a_gap_is_not_rewarded() -> None:
    """Clipped by token the noisy third source would score most; the mean says that it has next to no gap."""
    tokens = {"prose": (0.5, -0.3, 0.4, 0.6), "code": (0.9, 0.1, 0.5, 0.5), "talk": (1.2, -1.1, 0.9, -0.8)}
    by_token = {name: sum(max(x, 0.0) for x in each) / 4 for name, each in tokens.items()}
    means = {name: sum(each) / 4 for name, each in tokens.items()}
    assert values(by_token) == near(0.375, 0.5, 0.525) and values(means) == near(0.3, 0.5, 0.05)
    stepped = exponentiated_step(PRIOR, means, 1.0, 0.0)
    assert stepped["talk"] < PRIOR["talk"]


def test_a_student_better_than_its_teacher_is_no_reason_to_take_weight() -> None:
    assert exponentiated_step(PRIOR, {"prose": -0.4, "code": -2.0, "talk": 0.0}, 1.0, 0.0) == pytest.approx(PRIOR)


def test_gaps_of_an_untrained_student_overflow_nothing() -> None:
    for gaps in ({"prose": 8.0, "code": 12.0, "talk": 3.0}, {"prose": 900.0, "code": 2000.0, "talk": 0.1}):
        stepped = bounded_step(PRIOR, gaps, 0.5)
        assert sum(stepped.values()) == pytest.approx(1) and max(stepped.values()) <= 0.5 + 0.5 / 3 + 1e-12


def test_bounds_hold_in_every_case() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        names = [f"s{i}" for i in range(draw.randint(1, 7))]
        total = [draw.random() ** 3 + 1e-9 for _ in names]
        prior = {name: weight / sum(total) for name, weight in zip(names, total, strict=True)}
        cap, floor = draw.uniform(0.1, 1.0), draw.choice([0.0, 0.05, draw.random(), 1.0])
        low = {name: floor * weight for name, weight in prior.items()}
        high = {name: max(cap, weight) for name, weight in prior.items()}
        wanted = {name: draw.choice([0.0, draw.random(), draw.random() * 1e6, 1e-12]) for name in names}
        if not any(wanted.values()):
            continue
        weights = within(wanted, low, high)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
        for name in names:
            assert low[name] - 1e-15 <= weights[name] <= high[name] + 1e-15
        inside = [name for name in names if low[name] < weights[name] < high[name] and wanted[name] > 0]
        for one, other in pairwise(inside):  # what no bound holds keeps its proportions
            assert weights[one] / weights[other] == pytest.approx(wanted[one] / wanted[other], rel=1e-6)
