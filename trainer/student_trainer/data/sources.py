"""Where documents come from: one class for sources of random access, one for streams. Opened by `loader`.

A source hands out blocks: `read(epoch, shard, block)` gives the documents `block * block_size ...` of a shard in the
order of that epoch; a block shorter than `block_size` ends the shard. A source of random access is one shard,
shuffled whole by a permutation that needs no memory.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa

from student_trainer.data.files import chat_content, no_column
from student_trainer.data.index import open_index
from student_trainer.data.order import key_of, shuffled
from student_trainer.data.settings import FILE_KINDS, SourceSettings

BLOCK_CHARACTERS = 1 << 18
LARGEST_BLOCK = 512
SAMPLED = 64


@dataclass(frozen=True)
class RawDocument:
    """A document as it lies in the source: text, {"messages", "tools"}, or token ids."""

    index: str  # names it within the source: "17", or "shard/17" in a stream
    content: Any


class Source(Protocol):
    """What the feed reads from."""

    name: str
    settings: SourceSettings
    block_size: int
    sequential: bool  # True: reading blocks out of order is slow, so one thread reads them one after another
    fingerprint: str

    def shards(self) -> int:
        """How many shards an epoch has."""

    def read(self, epoch: int, shard: int, block: int) -> list[RawDocument]:
        """One block in the order of the epoch; shorter than `block_size` at the shard's end."""

    def scan(self) -> Iterator[list[RawDocument]]:
        """All documents once, in blocks, in an order that is the same for every seed."""


class RandomAccessSource:
    """A memory-mapped data set, read in a shuffled order whose every position is computed."""

    sequential = False

    def __init__(self, name: str, settings: SourceSettings, dataset: datasets.Dataset, seed: int) -> None:
        if len(dataset) == 0:
            raise ValueError(f"source {name!r} holds no documents; give data with at least one")
        self.name, self.settings, self.seed = name, settings, seed
        self._dataset = dataset
        sample_N = shuffled(np.arange(min(SAMPLED, len(dataset))), len(dataset), key_of("fingerprint"))
        sample = [_canonical(content) for content in self._fetch(sample_N)]
        self.fingerprint = f"{len(dataset)}:{key_of(sample):016x}"
        mean_characters = max(1, sum(map(len, sample)) // len(sample))
        self.block_size = int(np.clip(BLOCK_CHARACTERS // mean_characters, 1, LARGEST_BLOCK))

    def __len__(self) -> int:
        return len(self._dataset)

    def shards(self) -> int:
        return 1

    def read(self, epoch: int, shard: int, block: int) -> list[RawDocument]:
        start = block * self.block_size
        indices_N = np.arange(start, min(start + self.block_size, len(self)))
        if self.settings.shuffle and len(indices_N):
            indices_N = shuffled(indices_N, len(self), key_of(self.seed, self.name, epoch, "order"))
        return [RawDocument(str(i), c) for i, c in zip(indices_N, self._fetch(indices_N), strict=True)]

    def scan(self) -> Iterator[list[RawDocument]]:
        for start in range(0, len(self), self.block_size):
            positions_N = np.arange(start, min(start + self.block_size, len(self)))
            indices_N = shuffled(positions_N, len(self), key_of("scan"))
            yield [RawDocument(str(i), c) for i, c in zip(indices_N, self._fetch(indices_N), strict=True)]

    def _fetch(self, indices_N: np.ndarray) -> list[Any]:
        if len(indices_N) == 0:
            return []
        columns = self._dataset[indices_N]
        if "document" in columns:  # an index of ours
            chat = self.settings.format == "chat"
            return [json.loads(c) for c in columns["document"]] if chat else list(columns["document"])
        if self.settings.format == "chat":
            rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            return [chat_content(row, self.settings) for row in rows]
        return list(columns[self.settings.column_name])


def _canonical(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)


def _open_documents(name: str, settings: SourceSettings, cache_folder: str | None) -> datasets.Dataset:
    return datasets.Dataset(pa.table({"document": pa.array(settings.documents, pa.string())}))


def _open_arrow(name: str, settings: SourceSettings, cache_folder: str | None) -> datasets.Dataset:
    """What `save_to_disk` wrote."""
    if len(settings.path) != 1:
        raise ValueError(f"source {name!r}: kind arrow reads one folder, got {len(settings.path)}")
    try:
        opened = datasets.load_from_disk(settings.path[0], storage_options=settings.storage_options or None)
    except OSError as error:
        raise ValueError(
            f"source {name!r}: {settings.path[0]!r} is no folder that save_to_disk wrote: {error}"
        ) from error
    if isinstance(opened, datasets.DatasetDict):
        if settings.split not in opened:
            raise ValueError(f"source {name!r} has no split {settings.split!r}, it has {', '.join(sorted(opened))}")
        opened = opened[settings.split]
    return _wanted_columns(name, settings, opened)


def _open_hub(name: str, settings: SourceSettings, cache_folder: str | None) -> datasets.Dataset:
    assert settings.name is not None
    try:
        opened = datasets.load_dataset(
            settings.name, settings.subset, split=settings.split, revision=settings.revision, cache_dir=cache_folder
        )
    except (OSError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise ValueError(f"source {name!r}: cannot load {settings.name!r}: {type(error).__name__}: {error}") from error
    return _wanted_columns(name, settings, opened)


def _wanted_columns(name: str, settings: SourceSettings, dataset: datasets.Dataset) -> datasets.Dataset:
    columns = [column for column in (settings.column_name, settings.tools_column) if column]
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(no_column(f"source {name!r}", column, dataset.column_names))
    return dataset.select_columns(columns)


OPENERS: dict[str, Callable[[str, SourceSettings, str | None], datasets.Dataset]] = {
    **dict.fromkeys(FILE_KINDS, open_index),
    "documents": _open_documents,
    "arrow": _open_arrow,
    "hub": _open_hub,
}


def open_source(name: str, settings: SourceSettings, seed: int, cache_folder: str | None) -> Source:
    """Open a source; ValueError for whatever is missing, empty or not what the settings say."""
    return RandomAccessSource(name, settings, OPENERS[settings.kind](name, settings, cache_folder), seed)
