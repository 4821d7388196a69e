"""Pairs of held-out documents: the difference, its standard error, and what is said of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from demo.plan import make_plan
from demo.verdict import Difference, Verdict, paired, sentences, what_it_takes
from tests.unit.demo.test_plan import SLOW, WORKS


def lines(agreed: list[int], tokens: list[int]) -> list[dict[str, Any]]:
    return [
        {"source": "prose", "document": f"prose:{i}", "tokens": n, "agreed": a}
        for i, (a, n) in enumerate(zip(agreed, tokens, strict=True))
    ]


def test_difference_and_error_by_hand() -> None:
    found = paired(lines([10, 20, 30], [100, 100, 100]), lines([12, 21, 36], [100, 100, 100]))
    assert found.mean == pytest.approx(9 / 300)
    # Of equal documents the ratio's error is that of a mean: deviations -1, -2, 3 of 100 tokens each.
    assert found.standard_error == pytest.approx(math.sqrt((1 + 4 + 9) / 2 / 3) / 100)
    assert (found.documents, found.tokens) == (3, 300) and not found.by_more_than_chance


def test_the_error_is_the_spread_of_the_difference_over_draws_of_documents() -> None:
    draw = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        tokens = draw.integers(50, 256, 40)
        ease = draw.normal(0.5, 0.1, 40).clip(0, 1)
        plain = draw.binomial(tokens, ease)
        taught = plain + draw.binomial(tokens, 0.03) - draw.binomial(tokens, 0.01)
        found = paired(lines(plain.tolist(), tokens.tolist()), lines(taught.tolist(), tokens.tolist()))
        means.append(found.mean)
        errors.append(found.standard_error)
    assert np.mean(means) == pytest.approx(0.02, abs=0.001)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_runs_on_other_documents_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="expected the same two or more"):
        paired(lines([1, 2], [9, 9]), lines([1, 2, 3], [9, 9, 9]))


def test_what_is_said_follows_from_figures_both_ways() -> None:
    plan = make_plan(SLOW, 400, WORKS, 256)
    better = {"prose": (0.9, 0.8), "code": (1.2, 1.1)}
    helps = Verdict(Difference(0.02, 0.005, 30, 6000), better)
    assert helps.teacher_helps and what_it_takes(helps, plan, SLOW, 60) == ""
    assert "KL 0.800 with the teacher, 0.900 without (-11.1%)" in sentences(helps)
    assert "+2.00 points with the teacher, two standard errors of the paired difference are 1.00" in sentences(helps)
    # The same difference, too uncertain: more held-out text, and so more minutes.
    unsure = Verdict(Difference(0.02, 0.02, 30, 6000), better)
    assert not unsure.teacher_helps and unsure.held_out_factor() == pytest.approx(4.8)
    said = what_it_takes(unsure, plan, SLOW, 60)
    assert "This is not enough" in said and "--minutes" in said
    # KL worse on one source is not outweighed by agreement.
    assert not Verdict(helps.agreement, {**better, "code": (1.1, 1.2)}).teacher_helps
    assert "became slower" in what_it_takes(Verdict(helps.agreement, better, equal_steps=False), plan, SLOW, 60)
    assert "--minutes" in what_it_takes(Verdict(Difference(-0.01, 0.01, 30, 6000), better), plan, SLOW, 60)
