"""Chooses the device that a run computes on. Called by `ranks`, before the ranks connect, and by `build_components`.

On a machine with GPUs every rank has its own, made the process's current device before anything else uses CUDA.
Collectives, random states and caches of each process are then on its own GPU, not all on the first.
"""

from __future__ import annotations

import ctypes
import platform

import torch

from student_trainer.settings import RunSettings

# The names of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Smaller arrays come from the heap, which keeps freed memory; larger ones are rare, such as a checkpoint's.
HEAP_BELOW_BYTES = 2**30
NEVER = -1


def choose_device(settings: RunSettings, local: int = 0) -> torch.device:
    """The device of the `local`-th rank on this machine: `settings.device`, or for auto a GPU if there is one.

    ValueError for a device that this machine does not have, or that several ranks would share.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"run.device={name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"run.device={name}: no CUDA device is available; use run.device=cpu")
    if device.index is not None and local > 0:
        raise ValueError(f"run.device={name}: several ranks would share it; use run.device=cuda to give each its own")
    index = local if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"run.device={name}: this process needs CUDA device {index}, but the machine has "
            f"{torch.cuda.device_count()}; start at most as many ranks as there are GPUs"
        )
    return torch.device("cuda", index)


def use_device(device: torch.device) -> None:
    """Make it the process's current device. Call it before the process group is made and before the device is used."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Have malloc keep freed memory for later arrays, until the process ends. False if malloc cannot be told to.

    By default glibc returns every large array to the kernel as soon as it is freed, and the next array of that size
    consists of new pages, each cleared by the kernel on first access. In a training step of a model with 135M
    parameters those are 200,000 pages, and an eighth of its time. Every step needs the same memory as the last one, so
    nothing is gained by returning it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER)) and bool(mallopt(M_MMAP_THRESHOLD, HEAP_BELOW_BYTES))
