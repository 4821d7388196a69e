"""Which device a run computes on, asked of the machine. Called by `ranks`, before they connect, and by `components`.

On a machine with GPUs every rank has one of its own, which is made the process's current one before anything else uses
CUDA: collectives, random states and caches of that process then lie there, and not all on the first.
"""

from __future__ import annotations

import torch

from student_trainer.cpu_memory import keep_freed_memory
from student_trainer.settings import RunSettings


def choose_device(settings: RunSettings, local: int = 0) -> torch.device:
    """The device of the `local`-th rank on this machine: `settings.device`, or a GPU where there is one.

    ValueError for a device that this machine has not, or that ranks would share.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"run.device={name}: auto, cpu, cuda or cuda:N is expected")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"run.device={name}: no CUDA device is available; use run.device=cpu")
    if device.index is not None and local > 0:
        raise ValueError(f"run.device={name}: several ranks would share it; run.device=cuda gives each one of its own")
    index = local if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"run.device={name}: this process wants CUDA device {index}, the machine has {torch.cuda.device_count()}; "
            "start at most as many ranks as there are GPUs"
        )
    return torch.device("cuda", index)


def use_device(device: torch.device) -> None:
    """Make it the process's current device. Before the process group is made and before anything is put on it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
