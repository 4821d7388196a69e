"""Fixtures that any test may use: tiny models on disk, engines over them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float32 Llama with tokenizer: V=512, 2 layers, H=64, head_dim 32, 512 positions."""
    from tests.models import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
