"""Fresh random numbers for every test, and the seed in the output of those that fail."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_seed() -> int:
    """`LOSS_TEST_SEED` repeats a run."""
    seed = int(os.environ.get("LOSS_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    torch.manual_seed(seed)
    print(f"LOSS_TEST_SEED={seed}")
    return seed
