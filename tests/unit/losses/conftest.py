"""Fresh random numbers for every test, and the seed in the output of those that fail. Under `TRITON_INTERPRET`, where
`test_fused` runs these files, all of it goes through the kernels of a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from student_trainer.losses import chunks


@pytest.fixture(autouse=True)
def fresh_seed() -> int:
    """`LOSS_TEST_SEED` repeats a run."""
    seed = int(os.environ.get("LOSS_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    torch.manual_seed(seed)
    print(f"LOSS_TEST_SEED={seed}")
    return seed


@pytest.fixture(autouse=os.environ.get("TRITON_INTERPRET") == "1")
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels between the products, in blocks that are soon interpreted; on a CPU, Triton's interpreter runs them."""
    from student_trainer.losses.fused import launch

    monkeypatch.setattr(chunks, "kernels_serve", lambda device: True)
    monkeypatch.setattr(launch, "BLOCK", 256)
