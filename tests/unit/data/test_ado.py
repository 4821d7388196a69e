"""ADO: the worked example of its weights, and laws found again out of noisy losses."""

from __future__ import annotations

import json
import math
import random

import pytest

from student_trainer.data.policies.ado import POINTS, Ado, ScalingLaw, fit, preferences, thinned
from student_trainer.settings.mixture import AdoMixture

NAMES = ("prose", "code", "talk")
PRIOR = dict(zip(NAMES, (0.5, 0.3, 0.2), strict=True))


def test_the_worked_example() -> None:
    laws = [ScalingLaw(*law) for law in ((2, 0.6, 0.25), (2.5, 0.9, 0.3), (1, 0.3, 0.03))]
    slopes = {name: law.slope(1e5) for name, law in zip(NAMES, laws, strict=True)}
    rho = preferences(PRIOR, slopes, dict(zip(NAMES, (0.45, 0.35, 0.2), strict=True)))
    assert list(rho.values()) == pytest.approx([0.544745, 0.320701, 0.134554], abs=1e-6)
    weights = [0.9 * PRIOR[name] + 0.1 * rho[name] for name in NAMES]
    assert weights == pytest.approx([0.504474, 0.302070, 0.193455], abs=1e-6)


@pytest.mark.parametrize("law", [(2.5, 0.9, 0.3), (3.0, 0.6, 0.2), (4.0, 1.2, 0.5)])
def test_a_law_is_found_again(law: tuple[float, float, float]) -> None:
    truth, draw = ScalingLaw(*law), random.Random(0)
    tokens = [1000.0 * (i + 1) for i in range(200)]
    losses = [(math.exp(truth.e) + truth.reducible(n)) * math.exp(draw.gauss(0, 2e-3)) for n in tokens]
    found = fit(tokens, losses)
    for n in (5e4, 2e5):
        assert found.slope(n) == pytest.approx(truth.slope(n), rel=0.15)


def test_a_loss_below_the_published_bound_is_fitted_too() -> None:
    tokens = [1000.0 * (i + 1) for i in range(100)]
    found = fit(tokens, [0.4 + 3 * n**-0.3 for n in tokens])
    assert math.exp(found.e) + found.reducible(5e4) == pytest.approx(0.4 + 3 * 5e4**-0.3, rel=0.01)


def test_more_of_what_still_falls() -> None:
    """Two sources, one that has stopped falling: its weight goes down, by a tenth of what the laws say at once."""
    ado = Ado.of(AdoMixture(update_interval=100), {"done": 0.5, "falls": 0.5})
    for step in range(400):
        n = 100.0 * (step + 1)
        ado = ado.observe(
            step,
            {
                "source/done/tokens": 50, "source/done/student_cross_entropy": 2.0 + 0.001 * math.sin(step),
                "source/falls/tokens": 50, "source/falls/student_cross_entropy": 2.0 + 20 * n**-0.4,
            },
        )  # fmt: skip
        if step == 250:  # what JSON keeps goes on as it would have
            ado = Ado.of(AdoMixture(update_interval=100), {"done": 0.5, "falls": 0.5}).restored(
                json.loads(json.dumps(ado.state()))
            )
    assert ado.current["falls"] > 0.6 and sum(ado.current.values()) == pytest.approx(1)
    assert ado.decision is not None and ado.decision.reasons["falls"]["slope"] > ado.decision.reasons["done"]["slope"]


def test_a_source_that_gave_too_little_counts_as_the_others_do() -> None:
    ado = Ado.of(AdoMixture(update_interval=20), {"a": 0.4, "b": 0.4, "rare": 0.2})
    for step in range(20):
        figures = {"source/a/tokens": 50, "source/a/student_cross_entropy": 3.0 + 5 * (step + 1) ** -0.5}
        figures |= {"source/b/tokens": 50, "source/b/student_cross_entropy": 3.0 + 5 * (step + 1) ** -0.5}
        ado = ado.observe(step, figures)
    assert ado.decision is not None and "rare" not in ado.decision.reasons
    assert ado.current["a"] == pytest.approx(ado.current["b"]) and 0.17 < ado.current["rare"] < 0.2


def test_a_curve_stays_short() -> None:
    points: tuple[tuple[float, float], ...] = ()
    for i in range(10_000):
        points = thinned((*points, (float(i), 1.0)))
    assert POINTS // 2 <= len(points) <= POINTS and points[-1][0] == 9999.0
