"""Intermediate results of an influence measurement, saved in parts beside its output. Made by `cli.influence`, filled
and read by `measure`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False)
class PartFiles:
    """Parts of an unfinished measurement, in a folder. Parts with another `fingerprint` are deleted."""

    folder: Path
    fingerprint: str
    made: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        known = self.folder / "question.json"
        if self.folder.exists() and (not known.exists() or known.read_text() != self.fingerprint):
            rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        known.write_text(self.fingerprint)

    def find(self, name: str) -> Tensor | None:
        path = self.folder / f"{name}.npy"
        return torch.from_numpy(np.load(path)) if path.exists() else None

    def keep(self, name: str, part: Tensor) -> Tensor:
        unfinished = self.folder / f"{name}.unfinished.npy"
        np.save(unfinished, part.numpy())
        unfinished.replace(self.folder / f"{name}.npy")
        self.made += 1
        return part

    def remove(self) -> None:
        rmtree(self.folder)
