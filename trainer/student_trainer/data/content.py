"""Hashes of all documents of a source, computed once, cached beside the index, and compared on resume.

Used by `index` and `random_access` for indexed sources (`ContentHasher`, `content_of`) and by `streamed` for files
(`files_content`). A change in any document changes the fingerprint, and `Content.difference` says where. Hashes of
local files are cached by path, size, inode, mtime and ctime; ctime can't be set back, so an edited file is always
hashed again, at the disk's speed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from student_trainer.data.files import DataFile
from teacher_proto.process.stages import Stage, stage

logger = logging.getLogger(__name__)
VERSION = 1
LEAF = 64  # documents that share a hash: a difference can't be located more precisely
HASH_BYTES = 8
SLICE = 64 * LEAF
MOST_BLOCKS = 256  # hashes per source in a checkpoint
READ_BYTES = 2**24


@dataclass(frozen=True)
class Content:
    """Hashes of a source's parts, in order. `count` is in `unit`s, "documents" or "files". `names`: of the files."""

    count: int
    hashes: tuple[str, ...]
    unit: str = "documents"
    names: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([VERSION, self.count, self.hashes]).encode()).hexdigest()[:32]

    @property
    def block(self) -> int:
        """The number of documents (or files) in a block of `to_json`."""
        leaves = -(-len(self.hashes) // MOST_BLOCKS) if self.unit == "documents" else 1
        return LEAF * max(1, leaves) if self.unit == "documents" else 1

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps: enough to say where other content differs."""
        step = self.block // LEAF if self.unit == "documents" else 1
        blocks = [
            hashlib.sha256("".join(self.hashes[start : start + step]).encode()).hexdigest()[: 2 * HASH_BYTES]
            for start in range(0, len(self.hashes), step)
        ][: 16 * MOST_BLOCKS]
        return {"unit": self.unit, "count": self.count, "block": self.block, "blocks": blocks,
                "names": list(self.names[: 16 * MOST_BLOCKS])}  # fmt: skip

    def difference(self, saved: Mapping[str, Any]) -> str:
        """A description of where this content differs from the `saved` one of `to_json`."""
        ours = self.to_json()
        unit, was = self.unit, int(saved["count"])
        lines = [] if was == self.count else [f"{was:,} {saved['unit']} before, {self.count:,} {unit} now"]
        if saved["unit"] == unit and saved["block"] == ours["block"]:
            pairs = zip(saved["blocks"], ours["blocks"], strict=False)
            differ = [number for number, (then, now) in enumerate(pairs) if then != now]
            if differ:
                lines.append(self._place(differ, ours["block"]))
        return "; ".join(lines) or "where it differs is not known"

    def _place(self, differ: Sequence[int], block: int) -> str:
        first = differ[0]
        if self.unit == "files":
            shown = self.names[first] if first < len(self.names) else f"number {first}"
            return f"{len(differ):,} of its {self.count:,} files differ, the first is {shown}"
        last = min(self.count, (first + 1) * block)
        more = f", as do others in {len(differ) - 1:,} more places" if len(differ) > 1 else ""
        return f"at least one of documents {first * block + 1:,} to {last:,} of {self.count:,} differs{more}"


class ContentHasher:
    """Hashes documents incrementally, from chunks of a column `document`. The chunks' boundaries don't matter."""

    def __init__(self) -> None:
        self._hashes: list[str] = []
        self._count = 0
        self._lengths, self._bytes = hashlib.sha256(), hashlib.sha256()

    def add(self, column: pa.ChunkedArray) -> None:
        for array in column.chunks:
            # Lengths are hashed apart from bytes: "ab", "c" and "a", "bc" are different documents with the same bytes.
            offsets, data = _flat(array)
            start = 0
            while start < len(array):
                # Up to the end of the leaf, which may have begun in the previous chunk.
                stop = min(len(array), start + LEAF - self._count % LEAF)
                self._lengths.update(np.diff(offsets[start : stop + 1]).tobytes())
                self._bytes.update(data[offsets[start] : offsets[stop]].tobytes())
                self._count += stop - start
                if self._count % LEAF == 0:
                    self._close()
                start = stop

    def finish(self) -> Content:
        if self._count % LEAF:
            self._close()
        return Content(self._count, tuple(self._hashes))

    def _close(self) -> None:
        self._hashes.append(_short(self._lengths.digest() + self._bytes.digest()))
        self._lengths, self._bytes = hashlib.sha256(), hashlib.sha256()


def content_of(name: str, dataset: datasets.Dataset, folder: Path) -> Content:
    """The content of a data set on this disk. The result is cached in `folder` until its files change."""
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    kept, state = kept_at(dataset, folder), state_of(files)
    if state and (content := _kept(kept, state)) is not None:
        return content
    with stage(f"hashing the documents of source {name!r}, once", len(dataset), "documents") as doing:
        content = _hash(dataset, doing)
    if state and state == state_of(files):
        keep(kept, state, content)
    return content


def files_content(name: str, files: Sequence[DataFile], folder: Path) -> Content:
    """The content of streamed files: for remote ones their size and the store's hash or etag, for local ones their own
    hash, cached as in `content_of`. ValueError for a file that can't be read.
    """
    local = sum(file.size for file in files if file.local_path is not None) / 1e6
    hashes, silent = [], []
    with stage(f"hashing the files of source {name!r}, once", local or None, "MB") as doing:
        for file in files:
            path = file.local_path
            if path is not None:
                hashes.append(f"{file.size}:{_file_hash(path, folder, doing)}")
                continue
            hashes.append(f"{file.size}:{file.told or ''}")
            if not file.told:
                silent.append(file.url)
    if silent:
        logger.warning(
            "source %r: its store reports the size of %d files (such as %s), but no hash of their content: a change "
            "that keeps the size will not be noticed on resume", name, len(silent), silent[0],
        )  # fmt: skip
    return Content(len(files), tuple(hashes), "files", tuple(file.url.rpartition("/")[2] for file in files))


def _file_hash(path: Path, folder: Path, doing: Stage) -> str:
    kept = folder / f"{_short(str(path).encode())}.content.json"
    try:
        state = state_of([path])
        if (content := _kept(kept, state)) is not None:
            doing.done += state[0][1] / 1e6
            return content.hashes[0]
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(READ_BYTES):
                digest.update(part)
                doing.done += len(part) / 1e6
        # The hash of a file that was written to while it was read must not be cached.
        unchanged = state == state_of([path])
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if unchanged:
        keep(kept, state, Content(1, (digest.hexdigest(),), "files"))
    return digest.hexdigest()


def kept_at(dataset: datasets.Dataset, folder: Path) -> Path:
    """Where the hashes of a data set are cached. The fingerprint of `datasets` covers what `select` or a saved shuffle
    did to its files.
    """
    files = [entry["filename"] for entry in dataset.cache_files]
    key = [str(dataset._fingerprint), len(dataset), dataset.column_names, files]
    return folder / f"{_short(json.dumps(key).encode())}.content.json"


def state_of(files: Sequence[Path]) -> list[list[Any]]:
    """A value that changes when a file is written to, even if its mtime is set back."""
    stats = [(path, path.stat()) for path in files]
    return [[str(path), s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for path, s in stats]


def keep(path: Path, state: list[list[Any]], content: Content) -> None:
    """Cache the content of files in this state. If that fails, they are hashed again next time."""
    # Renamed into place, so that other processes read either the old or the new file.
    fresh = path.with_suffix(f".{time.monotonic_ns()}.new")
    noted = {"version": VERSION, "of": state, "count": content.count, "hashes": content.hashes}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(noted))
        fresh.replace(path)
    except OSError as error:
        logger.warning(
            "cannot cache the hashes of %s: %s. They will be recomputed at the next start", state[0][0], error
        )


def _kept(path: Path, state: list[list[Any]]) -> Content | None:
    try:
        kept = json.loads(path.read_text())
        if kept["version"] == VERSION and kept["of"] == state:
            return Content(int(kept["count"]), tuple(kept["hashes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # only a cache: what can't be read is computed again
    return None


def _hash(dataset: datasets.Dataset, doing: Stage) -> Content:
    arrow = dataset.with_format("arrow")
    if dataset.column_names == ["document"] and _flat_type(dataset.data.schema.field("document").type):
        hasher = ContentHasher()
        for start in range(0, len(dataset), SLICE):
            hasher.add(arrow[start : start + SLICE].column("document"))
            doing.done = start
        return hasher.finish()
    return Content(len(dataset), tuple(_records(arrow, doing)))


def _records(arrow: datasets.Dataset, doing: Stage) -> Iterator[str]:
    """Hashes of documents with any columns, also nested ones, from their bytes in Arrow's IPC format."""
    for start in range(0, len(arrow), SLICE):
        doing.done = start
        # Metadata may say when or by what a file was written, which is not content.
        table = arrow[start : start + SLICE].replace_schema_metadata(None)
        for first in range(0, len(table), LEAF):
            leaf = table.slice(first, LEAF).combine_chunks().to_batches()
            yield _short(b"".join(bytes(batch.serialize()) for batch in leaf))


def _flat_type(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.list_(pa.int32()))


def _flat(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The offsets of all documents in their joint bytes, including the end, and these bytes, without a copy."""
    assert _flat_type(array.type) and not array.null_count, array.type
    _, offsets, *_ = array.buffers()
    # A slice shares the buffers of the full array: its offsets begin at `array.offset`.
    offsets_N = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    if array.type == pa.string():
        data = array.buffers()[2]
        return offsets_N, np.frombuffer(data if data is not None else b"", np.uint8)
    values = array.values.to_numpy(zero_copy_only=True)
    return offsets_N * values.itemsize, values.view(np.uint8)


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[: 2 * HASH_BYTES]
