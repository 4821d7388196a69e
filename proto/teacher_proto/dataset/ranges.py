"""Fetches row groups and footers of shards, one range request each, and caches them in a size-limited local folder.

Used by `dataset.py`. Nothing is cached for a dataset on a local disk. The groups after the requested one are prefetched
on threads, since documents are mostly read in the order in which they were written.

A cached file ends with the CRC-32 of what precedes it. A damaged one is fetched again, and what can't be cached is
fetched whenever it is needed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import threading
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from teacher_proto.dataset.folder import Folder
from teacher_proto.dataset.index import Place, ShardNote

log = logging.getLogger(__name__)
FETCHERS = 4
_CRC_BYTES = 4


class Ranges:
    """`requests` and `bytes_fetched` count the requests to the bucket. Thread-safe; close it.

    `cache`: the cache folder, a temporary one if None; `cache_bytes` limits its size. `ahead`: how many row groups are
    prefetched after the one that is needed.
    """

    def __init__(self, folder: Folder, below: str, cache: Path | None, cache_bytes: int, ahead: int):
        self._folder, self._below, self._bytes, self._ahead = folder, below, cache_bytes, ahead
        self.requests = self.bytes_fetched = 0
        self._failed = False
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._temporary = None if cache is not None or folder.local else tempfile.TemporaryDirectory()
        self.path = cache if cache is not None else Path(self._temporary.name if self._temporary else ".")
        self._fetchers = ThreadPoolExecutor(FETCHERS, "dataset-fetch") if ahead and not folder.local else None
        if not folder.local:
            self.path.mkdir(parents=True, exist_ok=True)
            self._cache = Folder(str(self.path), outage_s=0.0)
            self._find_kept()

    def file(self, place: Place) -> tuple[bytes, io.RawIOBase]:
        """A shard's footer, and the shard as a file that holds only one row group. ValueError if it was truncated."""
        note, (begin, length, _) = place.shard, place.shard.groups[place.group].tolist()
        footer = self._get(note, "footer", 0, note.footer, note.bytes)
        group = self._get(note, "group", place.group, begin, begin + length)
        self._fetch_ahead(place)
        return footer, _Window(note.bytes, begin, group)

    def close(self) -> None:
        if self._fetchers is not None:
            self._fetchers.shutdown(cancel_futures=True)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _fetch_ahead(self, place: Place) -> None:
        if self._fetchers is None:
            return
        for group in range(place.group + 1, min(place.group + 1 + self._ahead, len(place.shard.groups))):
            if self._kept_name(place.shard, "group", group) not in self._sizes:
                begin, length, _ = place.shard.groups[group].tolist()
                # An error here is ignored: whoever needs the group fetches it again, and gets the error.
                self._fetchers.submit(self._get, place.shard, "group", group, begin, begin + length)

    def _kept_name(self, note: ShardNote, what: str, number: int) -> str:
        return f"{note.sha256[:24]}-{what}-{number}"

    def _get(self, note: ShardNote, what: str, number: int, begin: int, stop: int) -> bytes:
        if self._folder.local:
            return self._fetch(note, begin, stop)
        name = self._kept_name(note, what, number)
        with self._lock:
            one = self._locks.setdefault(name, threading.Lock())
        with one:
            kept = self._read_kept(name, stop - begin)
            if kept is None:
                kept = self._fetch(note, begin, stop)
                self._keep(name, kept)
            return kept

    def _fetch(self, note: ShardNote, begin: int, stop: int) -> bytes:
        place = f"{self._below}/{note.name}"
        try:
            data = self._folder.read_range(place, begin, stop)
        except FileNotFoundError:
            raise ValueError(
                f"{self._folder.url}/{place} is missing: the index lists it with {note.tokens} tokens. Restore it, or "
                f"remove its index file, run `stillhouse-teacher dataset merge`, and fill again"
            ) from None
        with self._lock:
            self.requests += 1
            self.bytes_fetched += len(data)
        if len(data) != stop - begin:
            raise ValueError(
                f"{self._folder.url}/{place} is truncated: expected {stop - begin} bytes at {begin}, got {len(data)}. "
                "Remove it and its index file, and run `stillhouse-teacher fill` again"
            )
        return data

    def _read_kept(self, name: str, size: int) -> bytes | None:
        try:
            kept = (self.path / name).read_bytes()
        except OSError:
            return None
        data, crc = kept[:-_CRC_BYTES], kept[-_CRC_BYTES:]
        if len(data) != size or _crc(data) != crc:
            return None
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
        return data

    def _keep(self, name: str, data: bytes) -> None:
        try:
            self._cache.write(name, data + _crc(data))
        except OSError as error:
            if not self._failed:
                log.warning("%s can't be written (%s): what is not in it is fetched again each time", self.path, error)
            self._failed = True
            return
        with self._lock:
            self._sizes[name] = len(data) + _CRC_BYTES
            self._sizes.move_to_end(name)
        self._make_room()

    def _make_room(self) -> None:
        """Evict the least recently used; the newest stays, whatever its size."""
        leaving = []
        with self._lock:
            total = sum(self._sizes.values())
            while total > self._bytes and len(self._sizes) > 1:
                oldest, size = self._sizes.popitem(last=False)
                total -= size
                leaving.append(oldest)
        for old in leaving:
            (self.path / old).unlink(missing_ok=True)

    def _find_kept(self) -> None:
        """Register the files that an earlier process cached, the oldest first, and remove what killed ones left."""
        with contextlib.suppress(OSError):
            self._cache.remove_unfinished("")
        found = []
        for path in self.path.iterdir():
            if not path.name.startswith(".") and path.suffix == "":
                with contextlib.suppress(FileNotFoundError):  # another process evicts too
                    found.append((path.stat(), path.name))
        for state, name in sorted(found, key=lambda pair: pair[0].st_mtime):
            self._sizes[name] = state.st_size
        self._make_room()


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC_BYTES, "little")


class _Window(io.RawIOBase):
    """A file of `size` bytes, of which only `data` at `begin` is available; reading elsewhere is a bug."""

    def __init__(self, size: int, begin: int, data: bytes):
        self._size, self._begin, self._data, self._at = size, begin, data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "a row group is read by its ranges"
        at = self._at - self._begin
        assert 0 <= at <= at + size <= len(self._data), f"bytes {self._at} to {self._at + size} were not fetched"
        self._at += size
        return self._data[at : at + size]
