"""What a source's documents are, as hashes of all of them: made once, kept beside the index, compared on resume.

Used by `random_access` for indexed sources (`ContentHasher`, `content_of`) and by `streamed` for files
(`files_content`). A changed document anywhere changes the fingerprint, and `Content.difference` says where. Hashes of
what lies on this disk are kept by path, size, inode, and times of modification and change; the last can't be set back,
so a file that was edited is hashed again, at the disk's speed.
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
LEAF = 64  # documents that share a hash, and so the finest place that a difference can be told of
HASH_BYTES = 8
SLICE = 64 * LEAF
MOST_BLOCKS = 256  # that a checkpoint holds of a source
READ_BYTES = 2**24


@dataclass(frozen=True)
class Content:
    """Hashes of a source's parts, in order. `unit`: what is counted, "documents" or "files". `names`: of files."""

    count: int
    hashes: tuple[str, ...]
    unit: str = "documents"
    names: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([VERSION, self.count, self.hashes]).encode()).hexdigest()[:32]

    @property
    def block(self) -> int:
        """How many documents a block of `to_json` has."""
        leaves = -(-len(self.hashes) // MOST_BLOCKS) if self.unit == "documents" else 1
        return LEAF * max(1, leaves) if self.unit == "documents" else 1

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps: the fingerprint, and enough to say where other content differs."""
        step = self.block // LEAF if self.unit == "documents" else 1
        blocks = [
            hashlib.sha256("".join(self.hashes[start : start + step]).encode()).hexdigest()[: 2 * HASH_BYTES]
            for start in range(0, len(self.hashes), step)
        ][: 16 * MOST_BLOCKS]
        return {"unit": self.unit, "count": self.count, "block": self.block, "blocks": blocks,
                "names": list(self.names[: 16 * MOST_BLOCKS])}  # fmt: skip

    def difference(self, saved: Mapping[str, Any]) -> str:
        """Where this content differs from one that `to_json` described, in words."""
        ours = self.to_json()
        unit, was = self.unit, int(saved["count"])
        lines = [] if was == self.count else [f"{was:,} {saved['unit']} then, {self.count:,} {unit} now"]
        if saved["unit"] == unit and saved["block"] == ours["block"]:
            pairs = zip(saved["blocks"], ours["blocks"], strict=False)
            differ = [number for number, (then, now) in enumerate(pairs) if then != now]
            if differ:
                lines.append(self._place(differ, ours["block"]))
        return "; ".join(lines) or "its parts are others"

    def _place(self, differ: Sequence[int], block: int) -> str:
        first = differ[0]
        if self.unit == "files":
            shown = self.names[first] if first < len(self.names) else f"number {first}"
            return f"of its {self.count:,} files {len(differ):,} differ, the first is {shown}"
        last = min(self.count, (first + 1) * block)
        more = f", and in {len(differ) - 1:,} more places" if len(differ) > 1 else ""
        return f"a document among the {first * block + 1:,}th to the {last:,}th of {self.count:,} differs{more}"


class ContentHasher:
    """Hashes documents as they come, in tables of the one column `document`; how they are cut into tables doesn't
    matter."""

    def __init__(self) -> None:
        self._hashes: list[str] = []
        self._count = 0
        self._lengths, self._bytes = hashlib.sha256(), hashlib.sha256()

    def add(self, column: pa.ChunkedArray) -> None:
        for array in column.chunks:
            # Lengths apart from bytes: "ab", "c" and "a", "bc" have the same bytes, and are other documents.
            offsets, data = _flat(array)
            start = 0
            while start < len(array):
                # As far as the leaf goes, which may have begun in the table before.
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
    """Of a data set on this disk. Hashed once; `folder` keeps the result for as long as its files stay as they are."""
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
    """Of files that are streamed: what their store says of their content; on this disk their own hash, kept like those
    of `content_of`. ValueError for a file that can't be read.
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
            "source %r: its store says of %d files how long they are, and nothing of their content (%s): a change of "
            "the same length will not be seen on resume", name, len(silent), silent[0],
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
        # A file that was written to while it was read has no hash that could be kept.
        unchanged = state == state_of([path])
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if unchanged:
        keep(kept, state, Content(1, (digest.hexdigest(),), "files"))
    return digest.hexdigest()


def kept_at(dataset: datasets.Dataset, folder: Path) -> Path:
    """Where the hashes of a data set are kept. What `select` or a saved shuffle made of its files is part of the
    fingerprint that `datasets` gives it.
    """
    files = [entry["filename"] for entry in dataset.cache_files]
    key = [str(dataset._fingerprint), len(dataset), dataset.column_names, files]
    return folder / f"{_short(json.dumps(key).encode())}.content.json"


def state_of(files: Sequence[Path]) -> list[list[Any]]:
    """What changes when a file is written to, whatever time it is given."""
    stats = [(path, path.stat()) for path in files]
    return [[str(path), s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for path, s in stats]


def keep(path: Path, state: list[list[Any]], content: Content) -> None:
    """Note the content of files that are in this state; where that can't be, they are hashed again next time."""
    # Renamed into place: another process that reads it meanwhile finds the old one or the new one, whole.
    fresh = path.with_suffix(f".{time.monotonic_ns()}.new")
    noted = {"version": VERSION, "of": state, "count": content.count, "hashes": content.hashes}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(noted))
        fresh.replace(path)
    except OSError as error:
        logger.warning("the hashes of %s can't be kept: %s. They are made again at the next start", state[0][0], error)


def _kept(path: Path, state: list[list[Any]]) -> Content | None:
    try:
        kept = json.loads(path.read_text())
        if kept["version"] == VERSION and kept["of"] == state:
            return Content(int(kept["count"]), tuple(kept["hashes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a cache: what can't be read is made again
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
    """Hashes of documents of any columns, nested ones too: of their bytes as Arrow sends them."""
    for start in range(0, len(arrow), SLICE):
        doing.done = start
        # Metadata may say when or by what a file was written: not what it holds.
        table = arrow[start : start + SLICE].replace_schema_metadata(None)
        for first in range(0, len(table), LEAF):
            leaf = table.slice(first, LEAF).combine_chunks().to_batches()
            yield _short(b"".join(bytes(batch.serialize()) for batch in leaf))


def _flat_type(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.list_(pa.int32()))


def _flat(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each document begins in the bytes of all of them, with their end; and the bytes. No copy is made."""
    assert _flat_type(array.type) and not array.null_count, array.type
    _, offsets, *_ = array.buffers()
    # A slice of an array shares the buffers of the whole: its own offsets begin at `array.offset`.
    offsets_N = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    if array.type == pa.string():
        data = array.buffers()[2]
        return offsets_N, np.frombuffer(data if data is not None else b"", np.uint8)
    values = array.values.to_numpy(zero_copy_only=True)
    return offsets_N * values.itemsize, values.view(np.uint8)


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[: 2 * HASH_BYTES]
