"""Reads sharded checkpoints: assembles tensors from the pieces that `sharded` wrote. Called by `files`.

    step-00000500/shard-00000.safetensors  shard-00001.safetensors  random.safetensors  state.json  manifest.json

A shard is a plain safetensors file with one rank's pieces of parameters and optimizer state, by name. Each piece's
offsets in its tensor are in the file's header, in the format of torch's HuggingFaceStorageReader. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

# Prefix of a shard's file name.
SHARD = "shard-"
# Separates the parameter's name from the state's in the name of an optimizer tensor.
STATE_OF = "//"
# Keys in a safetensors header: JSON with the offsets of each piece in its tensor.
SHARDING_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


class Pieces(Mapping[str, Tensor]):
    """Assembles each tensor on access and does not keep it, so that only one full tensor is in memory at a time."""

    def __init__(self, reader: _Reader, names: Sequence[str]) -> None:
        self._reader, self._names = reader, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        stored = self._reader.read_metadata().state_dict_metadata[name]
        # DCP copies each piece to its offsets in the full tensor, whichever ranks wrote them.
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            # Every rank reads on its own, and a process without ranks can read too, so DCP's warning says nothing.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads the files' headers once."""

    _known: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._known is None:
            self._known = super().read_metadata()
        return self._known


def read_shards(folder: Path) -> dict[str, Mapping[str, Tensor]]:
    """The model's and the optimizer's tensors in a folder of shards; SafetensorError if a file isn't safetensors."""
    reader = _Reader(str(folder))
    stored = reader.read_metadata().storage_data or {}
    names = sorted({index.fqn for index, at in stored.items() if Path(at.relative_path).name.startswith(SHARD)})
    model, optimizer = ([name for name in names if (STATE_OF in name) == state] for state in (False, True))
    return {"model": Pieces(reader, model), "optimizer": Pieces(reader, optimizer)}
