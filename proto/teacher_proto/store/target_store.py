"""The target store: answers of teachers on disk, found again by teacher, token ids and what is asked.

    store = TargetStore("targets", max_bytes=50 * 2**30)
    store.put(fingerprint, Query(tokens_T, rows, spec), targets)
    targets = store.get(fingerprint, Query(tokens_T, rows, spec))

Services read it before they ask their engine and write to it through `writer.py`; the trainer's cached teacher
reads it; `stillhouse-teacher fill` writes it offline. One LMDB environment: many processes may read and write, a kill
at any moment leaves it whole, and an entry that changed on disk counts as absent until it is written again. Beyond
`max_bytes` the least recently used entries leave. Needs the package `lmdb`, imported on demand.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from teacher_proto.errors import WireError
from teacher_proto.info import TeacherInfo, read_info
from teacher_proto.requests import Query
from teacher_proto.store.entry import (
    Entry,
    asked_entries,
    cut,
    entry_key,
    join,
    pack_entry,
    sequence_key,
    split,
    unpack_targets,
    whole_entry,
)
from teacher_proto.store.lmdb_lru import BusyError, DamagedError, LmdbLru, Reading, Writing
from teacher_proto.targets import TokenTargets

log = logging.getLogger(__name__)
T = TypeVar("T")

# An LMDB transaction keeps what it changes in memory.
_MAX_TRANSACTION_BYTES = 64 * 2**20
_MAX_TOUCHED = 1024


@dataclass(frozen=True)
class StoreStats:
    """`entries` and `bytes` are the store's, all else counts what this process did with it."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    written: int
    evicted: int
    damaged: int
    refused: int


@dataclass
class _Counts:
    hits: int = 0
    misses: int = 0
    written: int = 0
    damaged: int = 0
    refused: int = 0


class TargetStore:
    """A folder of stored targets. Thread-safe. Open it once a process, and not across a fork.

    ValueError where there is no store to read, or one of another format. `max_bytes` bounds the file.
    """

    def __init__(self, path: str | Path, max_bytes: int = 50 * 2**30, *, readonly: bool = False):
        self.path = Path(path)
        self.readonly = readonly
        self._counts = _Counts()
        self._lock = threading.Lock()
        self._touched: dict[bytes, None] = {}
        self._damaged: set[bytes] = set()
        self._lru = LmdbLru(self.path, max_bytes, readonly)

    def get(self, fingerprint: str, query: Query) -> TokenTargets | None:
        """The stored answer to `query`, bit for bit as it was put, or None. Its arrays are read-only."""
        found = self._seek(fingerprint, query, lambda asked, stored, value: cut(unpack_targets(value), stored, asked))
        if found is None:
            self._counts.misses += 1
            return None
        self._counts.hits += 1
        self._touch([key for key, _ in found])
        return join([part for _, part in found])

    def has(self, fingerprint: str, query: Query) -> bool:
        """Whether `get` would answer. Does not count as use."""
        return self._seek(fingerprint, query, lambda asked, stored, value: None) is not None

    def put(self, fingerprint: str, query: Query, targets: TokenTargets) -> None:
        """Keep an answer. It is on disk when this returns; nothing is if the process dies before."""
        self.put_entries(split(fingerprint, query, targets))

    def put_entries(self, entries: Iterable[tuple[Entry, TokenTargets]]) -> None:
        """Keep entries in as few transactions as memory allows; what is covered already is only marked as used."""
        assert not self.readonly, "a store that was opened to be read is not written to"
        batch: list[tuple[Entry, bytes]] = []
        size = 0
        for entry, targets in entries:
            value = pack_entry(entry, targets)
            if len(value) > self._lru.max_bytes // 8:
                self._counts.refused += 1
                log.warning("an entry of %d bytes is too large for a store of %d", len(value), self._lru.max_bytes)
                continue
            batch.append((entry, value))
            size += len(value)
            if size >= _MAX_TRANSACTION_BYTES:
                self._write(batch)
                batch, size = [], 0
        if batch:
            self._write(batch)

    def remember(self, info: TeacherInfo) -> None:
        """Keep who a fingerprint is, for those who read the store without the teacher."""
        assert not self.readonly, "a store that was opened to be read is not written to"
        self._lru.update(
            lambda writing: writing.remember_teacher(info.fingerprint.encode(), info.model_dump_json().encode())
        )

    def teachers(self) -> list[TeacherInfo]:
        """The teachers that were remembered, by fingerprint."""
        with self._lru.reading() as reading:
            return [read_info(TeacherInfo, json.loads(value)) for value in reading.teachers()]

    def entries(self) -> Iterator[tuple[Entry, TokenTargets]]:
        """All that is whole, in the order of the keys, as of now. What is damaged is counted and passed over."""
        with self._lru.reading() as reading:
            for key, value in reading.scan():
                stored = self._check(key, value)
                if stored is not None:
                    yield stored, unpack_targets(value)

    def stats(self) -> StoreStats:
        with self._lru.reading() as reading:
            entries, used = reading.entries(), reading.used_bytes()
        return StoreStats(
            entries=entries, bytes=used, max_bytes=self._lru.max_bytes, evicted=self._lru.evicted,
            **vars(self._counts),
        )  # fmt: skip

    def flush(self) -> None:
        """Write down what was used since the last write, which decides what leaves first."""
        if not self.readonly and (self._touched or self._damaged):
            self._write([])

    def close(self) -> None:
        self.flush()
        self._lru.close()

    def __enter__(self) -> TargetStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _seek(
        self, fingerprint: str, query: Query, take: Callable[[Entry, Entry, memoryview], T]
    ) -> list[tuple[bytes, T]] | None:
        """For each kind that is asked, the key of a whole entry that covers it and what `take` makes of its bytes."""
        taken = []
        try:
            with self._lru.reading() as reading:
                for asked in asked_entries(fingerprint, query):
                    found = self._find(reading, asked)
                    if found is None:
                        return None
                    key, stored, value = found
                    taken.append((key, take(asked, stored, value)))
        except DamagedError as error:
            self._counts.damaged += 1
            log.error("%s: what lies there counts as absent; the next start looks at the whole file", error)
            return None
        except BusyError as error:
            log.warning("%s: what lies there counts as absent this time", error)
            return None
        return taken

    def _find(self, reading: Reading, asked: Entry) -> tuple[bytes, Entry, memoryview] | None:
        """Key, description and verified bytes of a stored entry that covers `asked`."""
        for key, value in reading.scan(sequence_key(asked.fingerprint, asked.tokens_T)):
            stored = self._check(key, value, asked)
            if stored is not None:
                return key, stored, value
        return None

    def _check(self, key: bytes, value: memoryview, asked: Entry | None = None) -> Entry | None:
        """The description of an entry that is whole and where it belongs, and covers `asked`; else None."""
        try:
            stored = whole_entry(key, value, asked)
        except WireError as error:
            with self._lock:
                self._damaged.add(key)
            self._counts.damaged += 1
            if self._counts.damaged.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...
                log.warning(
                    "target store %s: %s; it counts as absent until it is written again (damaged so far: %d)",
                    self.path, error, self._counts.damaged,
                )  # fmt: skip
            return None
        return stored

    def _touch(self, keys: list[bytes]) -> None:
        with self._lock:
            self._touched.update(dict.fromkeys(keys))
            full = len(self._touched) >= _MAX_TOUCHED
        if full:
            self.flush()

    def _write(self, batch: list[tuple[Entry, bytes]]) -> None:
        """One transaction: forget what is damaged, mark what was used, write what is new. A fault is not raised: the
        store is a convenience, and its counters and the log tell."""
        with self._lock:
            touched, self._touched = self._touched, {}
            damaged, self._damaged = self._damaged, set()

        def change(writing: Writing) -> None:
            for key in damaged:
                # Somebody may have written it again since.
                again = writing.get(key)
                if again is not None and not _is_whole(key, again):
                    writing.delete(key)
            writing.touch(touched)
            for entry, value in batch:
                self._place(writing, entry, value)

        try:
            self._lru.update(change)
            self._counts.written += len(batch)
        except (DamagedError, OSError) as error:
            self._counts.refused += len(batch)
            log.error("the target store refused %d entries: %s", len(batch), error)

    def _place(self, writing: Writing, entry: Entry, value: bytes) -> None:
        """Put an entry where no whole one covers it, in place of those that it covers."""
        lesser = []
        for key, old in writing.scan(sequence_key(entry.fingerprint, entry.tokens_T)):
            stored = self._check(key, old)
            if stored is not None and stored.covers(entry):
                writing.touch([key])
                return
            if stored is None or entry.covers(stored):
                lesser.append(key)
        for key in lesser:
            writing.delete(key)
        writing.put(entry_key(entry), value)


def _is_whole(key: bytes, value: memoryview) -> bool:
    try:
        whole_entry(key, value)
    except WireError:
        return False
    return True
