"""A target dataset with the interface of a store: reads targets from shards in a folder or bucket, and adds shards.

    with TargetDataset("s3://bucket/targets") as dataset:
        targets = dataset.get(fingerprint, Query(tokens_T, rows, spec))

It has the methods of `TargetStore`, so the trainer's cached teacher reads either. `stillhouse-teacher fill --output`
writes shards with `add_shard`; `check.py` maintains existing datasets.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from teacher_proto.dataset.folder import Folder
from teacher_proto.dataset.index import IndexFile, Place, ShardNote, document_key, encode_index
from teacher_proto.dataset.listing import INDEX, INDEX_SUFFIX, SHARD_SUFFIX, SHARDS, read_index, remove_unfinished
from teacher_proto.dataset.manifest import Manifest, find_manifest
from teacher_proto.dataset.ranges import Ranges
from teacher_proto.dataset.shards import Rows, encode_shard, open_shard
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.store.entry import Entry, cut, join, requested_entries, sequence_key
from teacher_proto.store.parquet import Pair
from teacher_proto.targets import TokenTargets

log = logging.getLogger(__name__)
_MEMORY_BYTES = 256 * 2**20
_SHARD_BYTES = 256 * 2**20


class TargetDataset:
    """An existing dataset. Thread-safe; close it, or use it in a `with`: pending entries are written then.

    ValueError if there is none, or if shards are missing, truncated or not those of the index.
    `cache` is where parts of a bucket are kept on this disk, at most `cache_bytes`; `ahead` is how many row groups are
    prefetched. `create`: begin the dataset with this manifest if there is none; unfinished files of a killed writer are
    removed.
    """

    def __init__(
        self, url: str, *, options: Mapping[str, Any] | None = None, create: Manifest | None = None,
        readonly: bool = False, cache: Path | None = None, cache_bytes: int = 10 * 2**30, ahead: int = 2,
        outage_s: float = 120.0, shard_bytes: int = _SHARD_BYTES,
    ):  # fmt: skip
        self.path, self.readonly = url.rstrip("/"), readonly
        self.folder = Folder(url, options, outage_s=outage_s)
        self.manifest = _manifest(self.folder, create)
        if create is not None and (removed := remove_unfinished(self.folder)):
            log.info("%s: removed %d unfinished files of a killed writer", self.path, len(removed))
        self._lock = threading.RLock()
        self._shard_bytes = shard_bytes
        self._pending: dict[bytes, list[Pair]] = {}
        self._pending_bytes = 0
        self._rows: OrderedDict[tuple[str, int], Rows] = OrderedDict()
        self._loading: dict[tuple[str, int], threading.Lock] = {}
        self.ranges = Ranges(self.folder, SHARDS, cache, cache_bytes, ahead)
        self.index, self.without_index = read_index(self.folder, self.ranges.path)
        if self.without_index:
            log.warning(
                "%s: %d shards are newer than the index (first %s): their targets count as missing until "
                "`stillhouse-teacher dataset merge %s` adds them",
                self.path, len(self.without_index), self.without_index[0], self.path,
            )  # fmt: skip

    def teachers(self) -> list[TeacherInfo]:
        return [self.manifest.teacher]

    def remember(self, info: TeacherInfo) -> None:
        """ValueError if `info` is not the manifest's teacher."""
        if info.fingerprint != self.manifest.teacher.fingerprint:
            lines = self.manifest.teacher.identity.difference(info.identity)
            raise ValueError(f"the dataset at {self.path} is from another teacher: {'; '.join(lines)}")

    def covers(self, spec: TargetSpec) -> bool:
        """Whether the dataset's query covers all that `spec` requests."""
        if "gather" in spec.kinds:  # its ids are known only when a step begins
            return False
        stored, asked = (
            requested_entries("", Query(np.zeros(1, np.int64), (0, 1), one)) for one in (self.manifest.spec, spec)
        )
        return all(any(one.covers(other) for one in stored) for other in asked)

    def holds(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Whether there are targets for each document's token ids [T], as booleans; from the index only."""
        keys = [document_key(sequence_key(self.manifest.teacher.fingerprint, tokens_T)) for tokens_T in documents]
        with self._lock:
            return self.index.contains(np.array(keys, dtype=np.uint64))

    def get(self, fingerprint: str, query: Query) -> TokenTargets | None:
        """The targets for `query` as the codec stores them, or None. The arrays are read-only."""
        parts = []
        for asked in requested_entries(fingerprint, query):
            part = next((cut(targets, stored, asked) for stored, targets in self._stored(asked)), None)
            if part is None:
                return None
            parts.append(part)
        return join(parts)

    def put_entries(self, entries: Iterable[Pair]) -> None:
        """Add entries. `get` finds them at once; they are written as a shard when there are enough, or at `flush`."""
        assert not self.readonly, "the dataset was opened read-only"
        with self._lock:
            for entry, targets in entries:
                waiting = self._pending.setdefault(sequence_key(entry.fingerprint, entry.tokens_T), [])
                if not any(one.covers(entry) for one, _ in waiting):
                    waiting.append((entry, targets))
                    self._pending_bytes += targets.nbytes
            if self._pending_bytes >= self._shard_bytes:
                self.flush()

    def flush(self) -> None:
        """Write pending entries as a shard."""
        with self._lock:
            pending, self._pending, self._pending_bytes = self._pending, {}, 0
            if pending:
                self.add_shard(list(pending.values()))

    def add_shard(self, documents: Sequence[Sequence[Pair]]) -> ShardNote:
        """Write a shard of these documents' entries, and then its index, which makes it visible."""
        data, shard = encode_shard(self.manifest, documents)
        self.commit(data, encode_index([shard]), shard[0].name)
        return shard[0]

    def commit(self, data: bytes, index: bytes, name: str) -> None:
        """Write an encoded shard and its index."""
        self.folder.write(f"{SHARDS}/{name}", data)
        self.note(index, name)

    def note(self, index: bytes, name: str) -> None:
        """Write the index of an existing shard."""
        self.folder.write(f"{INDEX}/{name.removesuffix(SHARD_SUFFIX)}{INDEX_SUFFIX}", index)
        self.take_in(index, name)

    def take_in(self, index: bytes, name: str) -> None:
        """Add a shard that another process has written, with its index, to the index in memory."""
        with self._lock:
            self.index.add(IndexFile(index, name))

    def close(self) -> None:
        self.flush()
        self.ranges.close()

    def __enter__(self) -> TargetDataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stored(self, asked: Entry) -> Iterator[Pair]:
        """Pending and written entries that cover `asked`."""
        key = sequence_key(asked.fingerprint, asked.tokens_T)
        with self._lock:
            waiting = list(self._pending.get(key, ()))
            places = list(self.index.places(document_key(key)))
        yield from (pair for pair in waiting if pair[0].covers(asked))
        for place in places:
            for entry, targets in self._load(place).of(asked.fingerprint, asked.tokens_T):
                if entry.covers(asked):
                    yield entry, targets

    def _load(self, place: Place) -> Rows:
        """A row group; of several threads that need it, the first reads it."""
        key = (place.shard.name, place.group)
        with self._lock:
            one = self._loading.setdefault(key, threading.Lock())
        with one:
            with self._lock:
                rows = self._rows.get(key)
                if rows is not None:
                    self._rows.move_to_end(key)
                    return rows
            where = f"{self.path}/{SHARDS}/{place.shard.name}"
            footer, window = self.ranges.file(place)
            with open_shard(window, where, footer) as file:
                rows = Rows(file, place.group, self.manifest, where)
            with self._lock:
                self._rows[key] = rows
                while sum(kept.nbytes for kept in self._rows.values()) > _MEMORY_BYTES and len(self._rows) > 1:
                    self._loading.pop(self._rows.popitem(last=False)[0], None)
            return rows


def _manifest(folder: Folder, create: Manifest | None) -> Manifest:
    found = find_manifest(folder)
    if found is None:
        if create is None:
            raise ValueError(
                f"there is no target dataset at {folder.url}: `stillhouse-teacher fill --output` creates one"
            )
        folder.write(create.name, create.encode())
        # If another process began a different dataset here at the same time, there are now two: `find_manifest` raises.
        found = find_manifest(folder)
        assert found is not None
    if create is not None and found.digest != create.digest:
        raise ValueError(
            f"these settings differ from those of the dataset at {folder.url} ({create.difference(found)}): choose "
            "another --output, or use the dataset's settings"
        )
    return found
