"""Saves and restores a process's random state: Python, NumPy, torch, its GPU. Used by `loop`, `run`, `checkpoints`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random state: tensors for safetensors, and the rest for JSON."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch.cpu": torch.get_rng_state(), "numpy.keys": torch.from_numpy(np.array(keys, np.int64))}
    if torch.cuda.is_available():
        # Only this process's own device: reading another one's state would allocate memory on it.
        tensors[f"torch.cuda.{torch.cuda.current_device()}"] = torch.cuda.get_rng_state()
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    return tensors, plain


def restore(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Restore what `capture` returned. States of devices that this machine does not have are ignored."""
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, tensors["numpy.keys"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch.cpu"])
    if torch.cuda.is_available():
        state = tensors.get(f"torch.cuda.{torch.cuda.current_device()}")
        if state is not None:
            torch.cuda.set_rng_state(state)
