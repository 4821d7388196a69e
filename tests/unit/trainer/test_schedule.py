"""The learning rate is a pure function of the step; no floor raises it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.optim.optimizer import rate_factor

KINDS = ["cosine", "wsd", "linear", "constant"]


@given(
    kind=st.sampled_from(KINDS), steps=st.integers(1, 300), warmup=st.integers(0, 60), floor=st.floats(0, 1),
    decay=st.none() | st.integers(1, 100),
)  # fmt: skip
def test_a_rate_rises_only_in_the_warm_up_and_stays_between_floor_and_peak(
    kind: str, steps: int, warmup: int, floor: float, decay: int | None
) -> None:
    factors = [
        rate_factor(kind, step, steps=steps, warmup_steps=warmup, decay_steps=decay, floor=floor)  # type: ignore[arg-type]
        for step in range(steps)
    ]
    after = factors[warmup:]
    assert all(0 < f <= 1 for f in factors[:warmup]) and factors[:warmup] == sorted(factors[:warmup])
    assert all(floor - 1e-12 <= f <= 1 for f in after)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after)), "a rate rose after its warm-up"
    if after and kind != "constant":
        assert after[-1] == pytest.approx(floor, abs=1e-12)


def test_cosine_is_the_half_wave() -> None:
    factors = [rate_factor("cosine", step, steps=100, floor=0.1) for step in range(100)]
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step + 1) / 100)) for step in range(100)]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_linear_is_torchs_own() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.25, total_iters=50)
    for step in range(50):
        optimizer.step()
        theirs.step()
        assert rate_factor("linear", step, steps=50, floor=0.25) == pytest.approx(theirs.get_last_lr()[0])


def test_wsd_is_flat_until_its_decay() -> None:
    factors = [rate_factor("wsd", step, steps=100, warmup_steps=10, decay_steps=20) for step in range(100)]
    assert factors[9:80] == [1.0] * 71 and factors[80] < 1.0 and factors[99] == 0.0
    assert rate_factor("wsd", 89, steps=100) == 1.0 and rate_factor("wsd", 90, steps=100) < 1.0
