"""The target store: teachers' targets on disk, looked up by teacher, token ids and query.

    store = TargetStore("targets", max_bytes=50 * 2**30)
    store.put(fingerprint, Query(tokens_T, rows, spec), targets)
    targets = store.get(fingerprint, Query(tokens_T, rows, spec))

Services read it before they call their engine, and write to it through `writer.py`; the trainer's cached teacher reads
it; `stillhouse-teacher fill` writes it offline. It is one LMDB environment: many processes may read and write, a kill
at any moment leaves it consistent, and a damaged entry counts as absent until it is written again. Beyond `max_bytes`
the least recently used entries are evicted. Needs the package `lmdb`, imported on demand.
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
    cut,
    entry_key,
    join,
    pack_entry,
    requested_entries,
    sequence_key,
    split,
    unpack_targets,
    whole_entry,
)
from teacher_proto.store.lmdb_lru import BusyError, DamagedError, LmdbLru, Reading, Writing
from teacher_proto.targets import TokenTargets

log = logging.getLogger(__name__)
T = TypeVar("T")

# An LMDB transaction holds its changes in memory.
_MAX_TRANSACTION_BYTES = 64 * 2**20
_MAX_TOUCHED = 1024


@dataclass(frozen=True)
class StoreStats:
    """`entries`, `bytes` and `max_bytes` are those of the store; the other counters are those of this process."""

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
    """A folder of stored targets. Thread-safe. Open it once per process, and do not use it across a fork.

    ValueError if there is no store to read, or one of another format. `max_bytes` limits the size of the file.
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
        """The stored targets for `query`, bit for bit as they were put, or None. The arrays are read-only."""
        found = self._seek(fingerprint, query, lambda asked, stored, value: cut(unpack_targets(value), stored, asked))
        if found is None:
            self._counts.misses += 1
            return None
        self._counts.hits += 1
        self._touch([key for key, _ in found])
        return join([part for _, part in found])

    def has(self, fingerprint: str, query: Query) -> bool:
        """Whether `get` would find the targets. Does not count as use."""
        return self._seek(fingerprint, query, lambda asked, stored, value: None) is not None

    def put(self, fingerprint: str, query: Query, targets: TokenTargets) -> None:
        """Store targets. They are on disk when this returns; if the process dies before, nothing is."""
        self.put_entries(split(fingerprint, query, targets))

    def put_entries(self, entries: Iterable[tuple[Entry, TokenTargets]]) -> None:
        """Store entries in as few transactions as memory allows; those that are covered already are marked as used."""
        assert not self.readonly, "the store was opened read-only"
        batch: list[tuple[Entry, bytes]] = []
        size = 0
        for entry, targets in entries:
            value = pack_entry(entry, targets)
            if len(value) > self._lru.max_bytes // 8:
                self._counts.refused += 1
                log.warning(
                    "an entry of %d bytes is too large for a store of %d bytes", len(value), self._lru.max_bytes
                )
                continue
            batch.append((entry, value))
            size += len(value)
            if size >= _MAX_TRANSACTION_BYTES:
                self._write(batch)
                batch, size = [], 0
        if batch:
            self._write(batch)

    def remember(self, info: TeacherInfo) -> None:
        """Store a teacher's description, for readers of the store that have no teacher to ask."""
        assert not self.readonly, "the store was opened read-only"
        self._lru.update(
            lambda writing: writing.remember_teacher(info.fingerprint.encode(), info.model_dump_json().encode())
        )

    def teachers(self) -> list[TeacherInfo]:
        """The descriptions of the remembered teachers, in the order of their fingerprints."""
        with self._lru.reading() as reading:
            return [read_info(TeacherInfo, json.loads(value)) for value in reading.teachers()]

    def entries(self) -> Iterator[tuple[Entry, TokenTargets]]:
        """All intact entries, in the order of their keys, as of now. Damaged ones are counted and skipped."""
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
        """Write which entries were used since the last write, which decides what is evicted first."""
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
        """For each requested kind, the key of an intact entry that covers it, and what `take` returns for its bytes.
        None if a kind is missing."""
        taken = []
        try:
            with self._lru.reading() as reading:
                for asked in requested_entries(fingerprint, query):
                    found = self._find(reading, asked)
                    if found is None:
                        return None
                    key, stored, value = found
                    taken.append((key, take(asked, stored, value)))
        except DamagedError as error:
            self._counts.damaged += 1
            log.error("%s: its targets count as missing; the next start checks the whole file", error)
            return None
        except BusyError as error:
            log.warning("%s: its targets count as missing this time", error)
            return None
        return taken

    def _find(self, reading: Reading, asked: Entry) -> tuple[bytes, Entry, memoryview] | None:
        """Key, description and verified bytes of a stored entry that covers `asked`, or None."""
        for key, value in reading.scan(sequence_key(asked.fingerprint, asked.tokens_T)):
            stored = self._check(key, value, asked)
            if stored is not None:
                return key, stored, value
        return None

    def _check(self, key: bytes, value: memoryview, asked: Entry | None = None) -> Entry | None:
        """The description of an entry if it is intact, under its own key, and covers `asked`; else None."""
        try:
            stored = whole_entry(key, value, asked)
        except WireError as error:
            with self._lock:
                self._damaged.add(key)
            self._counts.damaged += 1
            if self._counts.damaged.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...
                log.warning(
                    "target store %s: %s; it counts as missing until it is written again (damaged so far: %d)",
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
        """In one transaction, delete damaged entries, mark used ones and write new ones. A failure is counted and
        logged, but not raised: the store is only a cache."""
        with self._lock:
            touched, self._touched = self._touched, {}
            damaged, self._damaged = self._damaged, set()

        def change(writing: Writing) -> None:
            for key in damaged:
                # Another process may have written it again since.
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
            log.error("the target store could not write %d entries: %s", len(batch), error)

    def _place(self, writing: Writing, entry: Entry, value: bytes) -> None:
        """Write an entry unless an intact one covers it; it replaces damaged ones and those that it covers."""
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
