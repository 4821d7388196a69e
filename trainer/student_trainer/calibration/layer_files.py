"""Saves what a calibration has found, one file per decoder layer, so that it can be resumed. Called by `calibrate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LayerFound:
    """The results for one decoder layer: A and B of each linear as tensors NAME.A and NAME.B, and by the linear's name
    |R|^2 before and after the correction.
    """

    tensors: Mapping[str, Tensor]
    errors: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class LayerFiles:
    """The finished layers of one calibration. `digest`: of everything that decides its outcome; files with another one
    are overwritten.
    """

    folder: Path
    digest: str

    def read(self, number: int) -> LayerFound | None:
        """What was found for layer `number`; None if that is still to be done."""
        path = self._path(number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("digest") != self.digest:
                    logger.warning("%s is from a calibration with other settings or data: recomputing it", path)
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s): recomputing it", path, error)
            return None
        errors = {name: (before, after) for name, (before, after) in json.loads(about["errors"]).items()}
        return LayerFound(tensors, errors)

    def write(self, number: int, found: LayerFound) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(number)
        unfinished = path.with_name(f".{path.name}.new")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in found.tensors.items()}
        save_file(tensors, unfinished, {"digest": self.digest, "errors": json.dumps(dict(found.errors))})
        unfinished.replace(path)

    def _path(self, number: int) -> Path:
        return self.folder / f"layer-{number:05d}.safetensors"
