"""A size-limited LRU cache of byte strings on disk, in LMDB. Used by `target_store.py`.

Five tables: records (key -> bytes), usage (key -> tick of its last use, and its size on disk), order (tick -> key),
meta and teachers. Every change is one transaction, so a kill leaves the tables consistent.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_proto.store.users import Users, make_sure
from teacher_proto.store.verify import PAGE, TABLES, open_to_read

if TYPE_CHECKING:
    import lmdb

log = logging.getLogger(__name__)

FORMAT = b"stillhouse targets 1"
# What a record costs besides its own pages: its key in three tables, and unused space in their pages.
_ROW_BYTES = 400
# Records are evicted above this share of the file: LMDB writes changed pages beside the old ones, which needs room.
_FILL = 0.8
_ROOM_TRIES = 4
_TRIM_STEP = 64
_RESIZE_WITHIN_S = 30.0
_USAGE = struct.Struct(">QQ")
_TICK = struct.Struct(">Q")


class DamagedError(Exception):
    """LMDB has met a damaged page. The next start checks the whole file."""


class BusyError(OSError):
    """The file can't be read right now, though nothing is wrong with it."""


class LmdbLru:
    """An open LMDB environment. `max_bytes` limits its file, unless that is larger already.

    ValueError if there is no usable file.
    A damaged file is renamed and replaced by an empty one, and an error is logged; with `readonly`, or while another
    process has it open, it raises ValueError. UncheckedError if the file could not be checked.
    """

    def __init__(self, path: Path, max_bytes: int, readonly: bool):
        self.path = path
        self.max_bytes = max_bytes
        self.evicted = 0
        try:
            import lmdb
        except ImportError:
            raise ValueError("the target store needs the package lmdb: pip install 'stillhouse[service]'") from None
        if readonly and not (path / "data.mdb").exists():
            raise ValueError(f"there is no target store at {path}: `stillhouse-teacher fill` creates one")
        self._gate, self._inside = threading.Condition(), 0
        self._users = Users(path, readonly)
        try:
            make_sure(path, readonly, self._users)
            try:
                path.mkdir(parents=True, exist_ok=True)
                self.env = open_to_read(path) if readonly else _open(path, max_bytes)
                self.records, self.usage, self.order, self.meta, self.teachers = _tables(self.env, path, readonly)
                if not readonly:
                    self.env.reader_check()
                    self._trim()
            except (lmdb.Error, OSError) as error:
                raise ValueError(f"{path} can't be opened as a target store: {error}") from None
        except BaseException:
            self._users.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """A consistent snapshot; the buffers that it returns are valid until it ends. DamagedError from anywhere
        inside, BusyError if there are too many readers.
        """
        import lmdb

        try:
            txn = self._begin_reading()
            try:
                with txn:
                    yield Reading(self, txn)
            finally:
                self._leave()
        except lmdb.ReadersFullError as error:
            raise BusyError(f"{self.path}: {error}") from error
        except lmdb.Error as error:
            raise DamagedError(f"{self.path}: {error}") from error

    def _begin_reading(self) -> lmdb.Transaction:
        """Begin a transaction that sees the whole file: another process may have grown it beyond our memory map."""
        import lmdb

        with self._gate:
            while True:
                try:
                    txn = self.env.begin(buffers=True)
                except lmdb.MapResizedError:
                    self._enlarge()
                except lmdb.ReadersFullError:
                    # Processes that were killed while they read have left their places taken.
                    if not self.env.reader_check():
                        raise
                else:
                    self._inside += 1
                    return txn

    def _leave(self) -> None:
        with self._gate:
            self._inside -= 1
            self._gate.notify_all()

    def _enlarge(self) -> None:
        """Map the file again at its present size, once no transaction of ours is open. Called with the gate held."""
        if not self._gate.wait_for(lambda: self._inside == 0, _RESIZE_WITHIN_S):
            raise BusyError(f"{self.path} has grown, but can't be mapped again while it is being read")
        self.env.set_mapsize(0)

    def update(self, change: Callable[[Writing], None]) -> None:
        """Run `change` in one transaction and commit it. If the file is full, make room and run it again.

        OSError if it stays full; DamagedError.
        """
        import lmdb

        for attempt in range(_ROOM_TRIES):
            grown = False
            with self._gate:
                self._inside += 1
            try:
                with self.env.begin(write=True, buffers=True) as txn:
                    writing = Writing(self, txn)
                    # Pages of evicted records are free only once nobody reads them: evict more at each attempt.
                    writing.make_room(attempt * self.max_bytes // 8)
                    change(writing)
                    writing.finish()
                self.evicted += writing.evicted
                return
            except lmdb.MapFullError:
                self.env.reader_check()
            except lmdb.MapResizedError:
                grown = True
            except lmdb.Error as error:
                raise DamagedError(f"{self.path}: {error}") from error
            finally:
                self._leave()
            if grown:
                with self._gate:
                    self._enlarge()
        raise OSError(
            f"the target store at {self.path} is full at {self.max_bytes} bytes, and its pages are still being read"
        )

    def close(self) -> None:
        self.env.close()
        self._users.close()

    def _trim(self) -> None:
        """Evict down to a limit that was lowered, in small transactions that need little room themselves."""
        evicted = 1
        while evicted:
            with self.env.begin(write=True, buffers=True) as txn:
                writing = Writing(self, txn)
                writing.make_room(0, at_most=_TRIM_STEP)
                writing.finish()
            evicted = writing.evicted
            self.evicted += evicted


class Reading:
    """A read transaction."""

    def __init__(self, lru: LmdbLru, txn: lmdb.Transaction):
        self._lru = lru
        self._txn = txn

    def get(self, key: bytes) -> memoryview | None:
        value = self._txn.get(key, db=self._lru.records)
        return None if value is None else memoryview(value)

    def scan(self, prefix: bytes = b"") -> Iterator[tuple[bytes, memoryview]]:
        """Keys and values of the records whose key begins with `prefix`, in the order of the keys."""
        cursor = self._txn.cursor(self._lru.records)
        if not cursor.set_range(prefix):
            return
        for raw, value in cursor:
            key = bytes(raw)
            if not key.startswith(prefix):
                return
            yield key, memoryview(value)

    def teachers(self) -> list[bytes]:
        return [bytes(value) for _, value in self._txn.cursor(self._lru.teachers)]

    def entries(self) -> int:
        return self._txn.stat(self._lru.records)["entries"]

    def used_bytes(self) -> int:
        return self._number(b"bytes")

    def _number(self, name: bytes) -> int:
        value = self._txn.get(name, db=self._lru.meta)
        return 0 if value is None else _TICK.unpack(value)[0]


class Writing(Reading):
    """A write transaction. `finish` writes the counters that it has changed."""

    def __init__(self, lru: LmdbLru, txn: lmdb.Transaction):
        super().__init__(lru, txn)
        self.evicted = 0
        self._bytes = self._number(b"bytes")
        self._tick = self._number(b"tick")

    def put(self, key: bytes, value: bytes) -> None:
        self.delete(key)
        size = _size_on_disk(len(value))
        self.make_room(size)
        self._txn.put(key, value, db=self._lru.records)
        self._mark(key, size)
        self._bytes += size

    def delete(self, key: bytes) -> None:
        usage = self._txn.get(key, db=self._lru.usage)
        if usage is not None:
            tick, size = _USAGE.unpack(usage)
            self._txn.delete(_TICK.pack(tick), db=self._lru.order)
            self._txn.delete(key, db=self._lru.usage)
            self._bytes -= min(size, self._bytes)
        self._txn.delete(key, db=self._lru.records)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark these as just used; keys that are gone are ignored."""
        for key in keys:
            usage = self._txn.get(key, db=self._lru.usage)
            if usage is not None:
                tick, size = _USAGE.unpack(usage)
                self._txn.delete(_TICK.pack(tick), db=self._lru.order)
                self._mark(key, size)

    def remember_teacher(self, fingerprint: bytes, info: bytes) -> None:
        self._txn.put(fingerprint, info, db=self._lru.teachers)

    def make_room(self, size: int, at_most: int = 2**62) -> None:
        """Evict the least recently used records, at most `at_most`, until `size` more bytes fit within the limit."""
        limit = int(self._lru.max_bytes * _FILL) - size
        while self._bytes > limit and self.evicted < at_most:
            cursor = self._txn.cursor(self._lru.order)
            if not cursor.first():
                return
            self.delete(bytes(cursor.value()))
            self.evicted += 1

    def finish(self) -> None:
        self._txn.put(b"bytes", _TICK.pack(self._bytes), db=self._lru.meta)
        self._txn.put(b"tick", _TICK.pack(self._tick), db=self._lru.meta)

    def _mark(self, key: bytes, size: int) -> None:
        self._tick += 1
        self._txn.put(key, _USAGE.pack(self._tick, size), db=self._lru.usage)
        self._txn.put(_TICK.pack(self._tick), key, db=self._lru.order)


def _size_on_disk(size: int) -> int:
    """The bytes that a record takes on disk. One that does not fit a shared page takes whole pages."""
    return _ROW_BYTES + (-(-(size + 16) // PAGE) * PAGE if size > PAGE // 2 - 100 else size)


def _open(path: Path, max_bytes: int) -> lmdb.Environment:
    import lmdb

    data = path / "data.mdb"
    there = data.stat().st_size if data.exists() else 0
    # An LMDB file does not shrink. If the limit was lowered below its size, it needs room for evicting records.
    size = max(max_bytes, 2**20) if there <= max_bytes else there + max(there // 8, 2**20)
    # metasync=False: a power cut may lose the last transaction, but never leaves half of one.
    return lmdb.open(str(path), map_size=-(-size // PAGE) * PAGE, max_dbs=len(TABLES), max_readers=512, metasync=False)


def _tables(env: lmdb.Environment, path: Path, readonly: bool) -> list[lmdb._Database]:
    tables = [env.open_db(name, create=not readonly) for name in TABLES]
    meta = tables[TABLES.index(b"meta")]
    with env.begin(write=not readonly) as txn:
        found = txn.get(b"format", db=meta)
        if found is None and not readonly:
            txn.put(b"format", FORMAT, db=meta)
        elif found != FORMAT:
            raise ValueError(f"{path} has format {(found or b'none').decode()!r}, expected {FORMAT.decode()!r}")
    return tables
