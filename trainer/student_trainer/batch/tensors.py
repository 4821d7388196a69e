"""Makes tensors of arrays, and moves records of tensors to a device without waiting for the copy. Used by `batch`,
`students`.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Record = TypeVar("Record")


def own_tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor with its own memory: an array may be a view of a response, which must not be written to."""
    wide = array.astype(np.int32) if array.dtype == np.uint16 else np.array(array)
    tensor = torch.from_numpy(wide)
    return tensor if dtype is None else tensor.to(dtype)


def to_device(record: Record, device: torch.device | str, **changes: Any) -> Record:
    """The dataclass with its tensors on `device`, except for the fields given in `changes`.

    Copies to a GPU are made from pinned memory, so that they are not waited for.
    """
    device = torch.device(device)
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if field.name not in changes and isinstance(value, Tensor) and value.device != device:
            changes[field.name] = moved(value, device)
    return replace(record, **changes) if changes else record  # type: ignore[type-var]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, which is not the one that it is on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
