"""Sources with random access to documents: indexed files, data sets on disk, texts in the settings.

Opened by `loader`. All are Arrow tables opened through `datasets`; the order of an epoch is computed, not stored.

In a source with weights, a document of weight w is read w times per epoch on average: floor(w) times, and once more
with probability w - floor(w), decided by a hash of seed, epoch and document. So documents of weight 0 cost nothing, no
loss is rescaled, and nothing but the weights is kept in memory.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from student_trainer.data.content import content_of
from student_trainer.data.documents import RawDocument, canonical
from student_trainer.data.hub import load_hub
from student_trainer.data.index import cache_root, open_index
from student_trainer.data.order import hashed, key_of, shuffled
from student_trainer.data.records import no_column, record_content
from student_trainer.data.sentiment import open_collection
from student_trainer.settings.data import FILE_KINDS, SourceSettings

BLOCK_CHARACTERS = 1 << 18  # approximate size of a block, so that blocks of long documents have few of them
LARGEST_BLOCK = 512
SAMPLED = 64
WEIGHT = "weight"  # the weights' column in an opened data set, whatever its name in the data


class RandomAccessSource:
    """A source with one shard, fully shuffled."""

    def __init__(
        self, name: str, settings: SourceSettings, dataset: datasets.Dataset, seed: int, cache_folder: str | None
    ) -> None:
        if len(dataset) == 0:
            raise ValueError(f"source {name!r} holds no documents; give data with at least one")
        self.name, self.settings, self.seed = name, settings, seed
        self._dataset = dataset
        weights_N = np.asarray(dataset.with_format("numpy")[WEIGHT]) if settings.weight_column else None
        self._repeats = None if weights_N is None else Repeats(weights_N, name, seed)
        sample_N = shuffled(np.arange(min(SAMPLED, len(dataset))), len(dataset), key_of("fingerprint"))
        sample = [canonical(content) for content in self._fetch(sample_N)]
        self.content = content_of(name, dataset, cache_root(cache_folder))
        self.fingerprint = f"{len(dataset)} documents:{key_of(sample):016x}:{self.content.fingerprint}"
        mean_characters = max(1, sum(map(len, sample)) // len(sample))
        self.block_size = int(np.clip(BLOCK_CHARACTERS // mean_characters, 1, LARGEST_BLOCK))

    def __len__(self) -> int:
        return len(self._dataset)

    def shards(self) -> int:
        """Always one."""
        return 1

    def read(self, epoch: int, shard: int, block: int) -> list[RawDocument]:
        """See `Source`."""
        count = len(self) if self._repeats is None else self._repeats.count(epoch)
        start = block * self.block_size
        places_N = np.arange(start, max(start, min(start + self.block_size, count)))
        if self.settings.shuffle and len(places_N):
            places_N = shuffled(places_N, count, key_of(self.seed, self.name, epoch, "order"))
        return self._documents(places_N if self._repeats is None else self._repeats.documents(epoch, places_N))

    def scan(self) -> Iterator[list[RawDocument]]:
        """See `Source`."""
        for start in range(0, len(self), self.block_size):
            positions_N = np.arange(start, min(start + self.block_size, len(self)))
            yield self._documents(shuffled(positions_N, len(self), key_of("scan")))

    def _documents(self, indices_N: np.ndarray) -> list[RawDocument]:
        return [RawDocument(str(i), c) for i, c in zip(indices_N, self._fetch(indices_N), strict=True)]

    def _fetch(self, indices_N: np.ndarray) -> list[Any]:
        if len(indices_N) == 0:
            return []
        columns = self._dataset[indices_N]
        if self.settings.kind in DATASETS:
            return self._from_dataset(columns)
        documents = columns["document"]
        return [json.loads(d) for d in documents] if self.settings.is_record else list(documents)

    def _from_dataset(self, columns: dict[str, list[Any]]) -> list[Any]:
        if self.settings.is_record:
            rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            return [record_content(row, self.settings) for row in rows]
        contents = list(columns[self.settings.column_name])
        if any(content is None for content in contents):
            raise ValueError(
                f"source {self.name!r}: some rows have no {self.settings.column_name!r}; drop or fill them"
            )
        return contents


Opener = Callable[[str, SourceSettings, str | None], datasets.Dataset]


def _open_documents(name: str, settings: SourceSettings, cache_folder: str | None) -> datasets.Dataset:
    table = pa.table({"document": pa.array(settings.documents, pa.string())})
    return datasets.Dataset(table, fingerprint=f"{key_of(settings.documents):016x}")


def _open_arrow(name: str, settings: SourceSettings, cache_folder: str | None) -> datasets.Dataset:
    """Open a data set written by `save_to_disk`."""
    if len(settings.path) != 1:
        raise ValueError(f"source {name!r}: kind arrow reads one folder, got {len(settings.path)}")
    try:
        opened = datasets.load_from_disk(settings.path[0], storage_options=settings.storage_options or None)
    except OSError as error:
        raise ValueError(f"source {name!r}: {settings.path[0]!r} was not written by save_to_disk: {error}") from error
    if isinstance(opened, datasets.DatasetDict):
        if settings.split not in opened:
            raise ValueError(f"source {name!r} has no split {settings.split!r}, it has {', '.join(sorted(opened))}")
        opened = opened[settings.split]
    return _wanted_columns(name, settings, opened)


def _open_hub(name: str, settings: SourceSettings, cache_folder: str | None) -> datasets.Dataset:
    return _wanted_columns(name, settings, load_hub(name, settings))


def _open_package(name: str, settings: SourceSettings, cache_folder: str | None) -> datasets.Dataset:
    assert settings.name is not None, "the settings say so"
    try:
        collection = open_collection(settings.name, settings.split)
    except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from error
    return _wanted_columns(name, settings, collection)


def _wanted_columns(name: str, settings: SourceSettings, dataset: datasets.Dataset) -> datasets.Dataset:
    if settings.weight_column in settings.columns:
        raise ValueError(f"source {name!r}: weight_column {settings.weight_column!r} is also a field of the documents")
    columns = [*settings.columns, *filter(None, (settings.weight_column,))]
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(no_column(f"source {name!r}", column, dataset.column_names))
    _check_type(name, settings, dataset.features[settings.column_name])
    wanted = dataset.select_columns(columns).with_format(None)
    return wanted.rename_column(settings.weight_column, WEIGHT) if settings.weight_column else wanted


def _check_type(name: str, settings: SourceSettings, feature: Any) -> None:
    """Refuse a wrong column when the source is opened, not when its first document is tokenised."""
    is_text = getattr(feature, "dtype", None) in ("string", "large_string")
    is_ids = getattr(getattr(feature, "feature", None), "dtype", "").startswith(("int", "uint"))
    if (settings.format == "text" and not is_text) or (settings.format == "tokens" and not is_ids):
        expected = {"text": "strings", "tokens": "lists of integers"}[settings.format]
        raise ValueError(f"source {name!r}: field {settings.column_name!r} is {feature}, expected {expected}")


DATASETS: dict[str, Opener] = {"arrow": _open_arrow, "hub": _open_hub, "package": _open_package}
OPENERS: dict[str, Opener] = {**dict.fromkeys(FILE_KINDS, open_index), "documents": _open_documents, **DATASETS}


class Repeats:
    """How often each document is read in an epoch. ValueError for weights that are negative, not finite or all 0."""

    def __init__(self, weights_N: np.ndarray, name: str, seed: int) -> None:
        if not np.isfinite(weights_N).all() or (weights_N < 0).any() or not (weights_N > 0).any():
            raise ValueError(
                f"source {name!r}: the documents' weights range from {weights_N.min()} to {weights_N.max()}; expected "
                "finite numbers of 0 or more, at least one above 0"
            )
        self._weights_N, self._name, self._seed = weights_N.astype(np.float64), name, seed
        self._of: tuple[int, np.ndarray] | None = None  # an epoch, and cumulative reads up to each document in it

    def count(self, epoch: int) -> int:
        """The number of documents in an epoch, each counted as often as it is read."""
        return int(self._ends(epoch)[-1])

    def documents(self, epoch: int, places_N: np.ndarray) -> np.ndarray:
        """The documents at these positions of an unshuffled epoch, in which each is repeated as often as it is read."""
        return np.searchsorted(self._ends(epoch), places_N, side="right")

    def _ends(self, epoch: int) -> np.ndarray:
        if self._of is None or self._of[0] != epoch:
            whole_N = np.floor(self._weights_N)
            chance_N = hashed(len(whole_N), key_of(self._seed, self._name, epoch, "repeats"))
            times_N = (whole_N + (chance_N < self._weights_N - whole_N)).astype(np.int64)
            if not times_N.any():  # chance has left out all of a few documents
                times_N = (self._weights_N > 0).astype(np.int64)
            self._of = epoch, np.cumsum(times_N)
        return self._of[1]
