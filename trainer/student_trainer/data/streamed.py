"""Sources read sequentially, without an index on the local disk: large or remote files, and hub data sets.

Opened by `loader`. A position in a stream is two integers, shard and document within it. Shards (the files, or the data
set's own shards) are shuffled each epoch, and documents within windows of `shuffle_window`. Seeking means opening the
shard and skipping to the window: by row groups in Parquet, by reading in other formats.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np

from student_trainer.data.content import Content, files_content
from student_trainer.data.documents import RawDocument, canonical
from student_trainer.data.files import DataFile, check_unchanged, find_files
from student_trainer.data.hub import stream_hub
from student_trainer.data.index import cache_root
from student_trainer.data.order import key_of, shuffled
from student_trainer.data.records import no_column, read_tables, record_content
from student_trainer.settings.data import SourceSettings

logger = logging.getLogger(__name__)
BLOCK = 64
SAMPLED = 16
ATTEMPTS = 5
Shard = Callable[[int], Iterator[Any]]  # the documents of a shard, from a given one on


class StreamedSource:
    """Blocks of a stream, read sequentially by one thread. Requesting any other block than the next is a seek."""

    block_size = BLOCK

    def __init__(
        self, name: str, settings: SourceSettings, shards: Sequence[Shard], content: Content, seed: int
    ) -> None:
        self.name, self.settings, self.seed = name, settings, seed
        self._window = -(-settings.shuffle_window // BLOCK) * BLOCK if settings.shuffle else BLOCK
        self._shards = shards
        self._place: tuple[int, int, int] | None = None  # epoch, shard and window of the documents in memory
        self._documents: list[RawDocument] = []
        self._rest: Iterator[Any] = iter(())
        contents = itertools.chain.from_iterable(shard(0) for shard in shards)
        sample = [canonical(content) for content in itertools.islice(contents, SAMPLED)]
        if not sample:
            raise ValueError(f"source {name!r} holds no documents; give data with at least one")
        self.content = content
        self.fingerprint = f"{len(shards)} shards:{key_of(sample):016x}:{content.fingerprint}"

    def shards(self) -> int:
        """See `Source`."""
        return len(self._shards)

    def read(self, epoch: int, shard: int, block: int) -> list[RawDocument]:
        """See `Source`."""
        window, first = divmod(block * BLOCK, self._window)
        if self._place != (epoch, shard, window):
            self._load(epoch, shard, window)
        return self._documents[first : first + BLOCK]

    def scan(self) -> Iterator[list[RawDocument]]:
        """See `Source`."""
        for number, shard in enumerate(self._shards):
            contents = enumerate(shard(0))
            while block := [RawDocument(f"{number}/{i}", c) for i, c in itertools.islice(contents, BLOCK)]:
                yield block

    def _load(self, epoch: int, shard: int, window: int) -> None:
        physical = self._physical(epoch, shard)
        start = window * self._window
        if window == 0 or self._place != (epoch, shard, window - 1):
            self._rest = self._shards[physical](start)
        self._place = None  # until the window is complete
        contents = self._take(physical, start)
        order_N = np.arange(len(contents))
        if self.settings.shuffle and len(contents):
            order_N = shuffled(order_N, len(contents), key_of(self.seed, self.name, epoch, shard, window, "order"))
        self._documents = [RawDocument(f"{physical}/{start + i}", contents[i]) for i in order_N]
        self._place = (epoch, shard, window)

    def _take(self, physical: int, start: int) -> list[Any]:
        """The next window. A broken connection is opened again after a few seconds."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return list(itertools.islice(self._rest, self._window))
            except (ValueError, OSError) as error:
                if attempt == ATTEMPTS or not _may_pass(error):
                    raise
                logger.warning("source %r: %s. Attempt %d in %d s", self.name, error, attempt + 1, 2**attempt)
                time.sleep(2**attempt)
                self._rest = self._shards[physical](start)
        raise AssertionError("the last attempt returns or raises")

    def _physical(self, epoch: int, shard: int) -> int:
        if not self.settings.shuffle:
            return shard
        return int(shuffled(np.array([shard]), len(self._shards), key_of(self.seed, self.name, epoch, "shards"))[0])


def _may_pass(error: BaseException) -> bool:
    """Whether the error may be temporary: raised by the network or the system, but not e.g. for a missing file."""
    cause = error.__cause__ or error
    return isinstance(cause, (ConnectionError, TimeoutError)) or type(cause) is OSError


def open_shards(name: str, settings: SourceSettings, cache_folder: str | None) -> tuple[list[Shard], Content]:
    """The shards and their content. ValueError for missing files."""
    if settings.kind != "hub":
        files = find_files(settings)
        content = files_content(name, files, cache_root(cache_folder))
        return [_FileShard(file, settings) for file in files], content
    stream, files = stream_hub(name, settings)
    content = files_content(name, files, cache_root(cache_folder))
    shards = [_HubShard(name, stream.shard(stream.num_shards, i), settings) for i in range(stream.num_shards)]
    return list(shards), content


class _FileShard:
    """One file of the source. Reading it raises ValueError if it has changed since the run opened it."""

    def __init__(self, file: DataFile, settings: SourceSettings) -> None:
        self._file, self._settings = file, settings

    def __call__(self, start: int) -> Iterator[Any]:
        check_unchanged(self._file, self._settings)
        for table in read_tables(self._file, self._settings, start):
            documents = table.column("document").to_pylist()
            yield from map(json.loads, documents) if self._settings.is_record else documents


class _HubShard:
    """One shard of a data set on the hub."""

    def __init__(self, name: str, stream: datasets.IterableDataset, settings: SourceSettings) -> None:
        self._name, self._stream, self._settings = name, stream, settings

    def __call__(self, start: int) -> Iterator[Any]:
        column = self._settings.column_name
        for row in self._stream.skip(start) if start else self._stream:
            if row.get(column) is None:
                raise ValueError(no_column(f"source {self._name!r}", column, list(row)))
            yield record_content(row, self._settings) if self._settings.is_record else row[column]
