"""Rates: pure functions of the step that no floor can raise."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from student_trainer.optim.optimizer import build_optimizer, rate_factor
from student_trainer.settings import OptimSettings
from tests.unit.students.tiny import tiny_model

kinds = st.sampled_from(["cosine", "wsd", "linear", "constant"])


@given(kinds, st.integers(1, 300), st.integers(0, 400), st.floats(0, 1), st.none() | st.integers(1, 400))
def test_a_rate_never_exceeds_its_peak_and_never_rises_after_the_warm_up(
    kind: str, steps: int, warmup: int, floor: float, decay: int | None
) -> None:
    factors = [
        rate_factor(kind, step, steps=steps, warmup_steps=warmup, decay_steps=decay, floor=floor)  # type: ignore[arg-type]
        for step in range(steps)
    ]
    assert all(0 <= factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
    assert all(factor >= floor - 1e-12 for factor in after)
    if kind != "constant" and after and warmup < steps:
        assert after[-1] == pytest.approx(floor, abs=1e-9)


def test_shapes_against_closed_forms() -> None:
    assert [rate_factor("cosine", s, steps=4, floor=0.2) for s in range(4)] == pytest.approx(
        [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (s + 1) / 4)) for s in range(4)]
    )
    assert [rate_factor("linear", s, steps=5, warmup_steps=1) for s in range(5)] == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0]
    )
    assert [
        rate_factor("wsd", s, steps=6, warmup_steps=2, decay_steps=2, floor=0.5) for s in range(6)
    ] == pytest.approx([0.5, 1, 1, 1, 0.75, 0.5])


@pytest.mark.parametrize("kind", ["adamw", "muon_clip"])
def test_each_group_falls_from_its_own_peak_to_its_own_floor(kind: str) -> None:
    """One floor in absolute terms for all groups would raise the small rates: here each is a share of its own."""
    settings = OptimSettings.model_validate({
        "kind": kind, "learning_rate": 0.02, "matrices": {"floor": 0.5}, "embeddings": {"learning_rate": 3e-4},
        "vectors": {"learning_rate": 1e-5, "floor": 0.0},
        "schedule": {"kind": "cosine", "warmup_steps": 3, "floor": 0.1},
    })  # fmt: skip
    model = tiny_model("qwen2")
    steps = 40
    optimizer = build_optimizer(settings, model, model.lm_head, steps)
    peaks = {"matrices": (0.02, 0.5), "embeddings": (3e-4, 0.1), "vectors": (1e-5, 0.0)}
    course = [optimizer.rates(number) for number in range(steps)]
    for name, (peak, floor) in peaks.items():
        rates = [rates[name] for rates in course]
        assert max(rates) == pytest.approx(peak) and max(rates) <= peak
        assert rates[-1] == pytest.approx(peak * floor, abs=1e-12)
        assert all(later <= earlier for earlier, later in pairwise(rates[2:]))


@pytest.mark.parametrize("kind", ["adamw", "muon_clip"])
def test_the_rates_that_are_told_are_the_rates_that_are_used(kind: str) -> None:
    """With a gradient of all ones AdamW's first step is the rate itself; Muon's is the rate times a known matrix."""
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))
    settings = OptimSettings.model_validate({
        "kind": kind, "learning_rate": 0.1, "weight_decay": 0.0, "schedule": {"warmup_steps": 4},
        "embeddings": {"learning_rate": 0.01}, "vectors": {"learning_rate": 0.001},
    })  # fmt: skip
    optimizer = build_optimizer(settings, model, None, 10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    rates = optimizer.step(1)
    assert rates == pytest.approx({"matrices": 0.05, "embeddings": 0.005, "vectors": 0.0005})
    moved = {
        name: (before[name] - parameter.detach()).abs().mean().item() for name, parameter in model.named_parameters()
    }
    assert moved["0.weight"] == pytest.approx(0.005, rel=1e-3)
    assert moved["1.bias"] == pytest.approx(0.0005, rel=1e-3)
    # The matrix of ones has one singular vector; Newton-Schulz brings its value near 1, spread over 8 x 8 entries.
    expected = 0.05 if kind == "adamw" else 0.05 * 0.2 * math.sqrt(8) / 8
    assert moved["1.weight"] == pytest.approx(expected, rel=1e-3 if kind == "adamw" else 0.35)
