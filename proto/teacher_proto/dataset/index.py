"""Index files, which map documents to row groups of shards, and their union in memory. Used by `dataset.py`.

A file has a magic number, the CRC-32 of all after the fixed-size head, the length of the header, the header (zlib of
JSON: the notes of all shards), padding to eight bytes, the row groups of all shards (`<i8` [3] each), the first eight
bytes of each document's `sequence_key` in ascending order (`<u8`), and for each the number of its row group (`<u4`),
counted through all shards. Arrays are memory-mapped, so that only what is looked up in a large index is in memory. An
eight-byte key may match a document that is not in the dataset, once in 10^11 look-ups at 10^8 documents, so a row's own
tokens are compared too.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = b"STLHIDX1"
_HEAD = struct.Struct("<8sIQ")
_MAX_PARTS = 16
Shard = tuple["ShardNote", np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class ShardNote:
    """What an index says about one shard. `groups` [G, 3]: begin and length in bytes, and rows, of each row group;
    `footer`: where the footer begins. `errors`: sums over rows, and maxima, as measured by a lossy codec.
    """

    name: str
    bytes: int
    sha256: str
    footer: int
    documents: int
    rows: int
    tokens: int
    groups: np.ndarray
    errors: Mapping[str, float] | None = None


def document_key(sequence_key: bytes) -> int:
    return int.from_bytes(sequence_key[:8], "little")


def encode_index(shards: Sequence[Shard]) -> bytes:
    """An index file of shards, each with the keys [n] of its documents and their row group numbers [n]."""
    before = np.cumsum([0, *(len(note.groups) for note, _, _ in shards)])
    keys = np.concatenate([keys for _, keys, _ in shards]).astype("<u8", copy=False)
    numbers = [(groups + first).astype("<u4") for (_, _, groups), first in zip(shards, before, strict=False)]
    order = np.argsort(keys, kind="stable")
    notes = [
        {name: value for name, value in vars(note).items() if name != "groups"} | {"num_groups": len(note.groups)}
        for note, _, _ in shards
    ]
    table = np.concatenate([note.groups for note, _, _ in shards]).astype("<i8")
    header = zlib.compress(json.dumps({"shards": notes}).encode())
    padding = bytes(-(len(header) + _HEAD.size) % 8)
    # 10^8 documents are gigabytes: avoid copies.
    parts = (header, padding, table.data, keys[order].data, np.concatenate(numbers)[order].data)
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join((_HEAD.pack(MAGIC, crc, len(header)), *parts))


class IndexFile:
    """One index file, verified. `data` may be a memory map: then only what is looked up stays in memory.

    ValueError, beginning with `place`, if it is no index or was truncated.
    """

    def __init__(self, data: Any, place: str):
        view = memoryview(data).cast("B")
        if len(view) < _HEAD.size or bytes(view[: len(MAGIC)]) != MAGIC:
            raise ValueError(
                f"{place} is not an index of a target dataset: `stillhouse-teacher dataset merge` creates one"
            )
        _, crc, size = _HEAD.unpack_from(view)
        if zlib.crc32(view[_HEAD.size :]) != crc:
            raise ValueError(
                f"{place} is truncated or has changed: remove it and run `stillhouse-teacher dataset merge`"
            )
        notes = json.loads(zlib.decompress(view[_HEAD.size : _HEAD.size + size]))["shards"]
        ends = np.cumsum([note.pop("num_groups") for note in notes]).tolist()
        begin = _HEAD.size + size + -(size + _HEAD.size) % 8
        table = np.frombuffer(view, "<i8", 3 * ends[-1], begin).reshape(-1, 3)
        begins = [0, *ends]
        self.shards = [ShardNote(groups=table[a:b], **note) for a, b, note in zip(begins, ends, notes, strict=False)]
        begin += table.nbytes
        count = (len(view) - begin) // 12
        self.keys = np.frombuffer(view, "<u8", count, begin)
        self.groups = np.frombuffer(view, "<u4", count, begin + 8 * count)


@dataclass(frozen=True)
class Place:
    """One row group of one shard."""

    shard: ShardNote
    group: int


class _Part:
    """Sorted keys, the row group number of each, and the shards that the numbers refer to."""

    def __init__(self, keys: np.ndarray, groups: np.ndarray, notes: Sequence[ShardNote]):
        self.keys, self.groups, self.notes = keys, groups, notes
        self.begins = np.cumsum([0, *(len(note.groups) for note in notes)])

    def places(self, key: int) -> Iterator[Place]:
        at, wanted = int(np.searchsorted(self.keys, np.uint64(key))), np.uint64(key)
        while at < len(self.keys) and self.keys[at] == wanted:
            number = int(self.groups[at])
            shard = int(np.searchsorted(self.begins, number, side="right")) - 1
            yield Place(self.notes[shard], number - int(self.begins[shard]))
            at += 1

    def by_shard(self) -> Iterator[Shard]:
        """Its shards one by one, as `encode_index` takes them."""
        owner = np.searchsorted(self.begins, self.groups, side="right") - 1
        order = np.argsort(owner, kind="stable")
        cuts = np.searchsorted(owner[order], np.arange(len(self.notes) + 1))
        for number, note in enumerate(self.notes):
            mine = order[cuts[number] : cuts[number + 1]]
            yield note, self.keys[mine], self.groups[mine].astype(np.int64) - int(self.begins[number])


class Index:
    """The union of index files. A shard in several of them counts once. Not thread-safe while files are added."""

    def __init__(self, files: Iterable[IndexFile] = ()):
        self.shards: dict[str, ShardNote] = {}
        self._parts: list[_Part] = []
        for file in files:
            self.add(file)

    def add(self, file: IndexFile) -> None:
        new = [note for note in file.shards if note.name not in self.shards]
        if not new:
            return
        if len(new) == len(file.shards):
            self._parts.append(_Part(file.keys, file.groups, file.shards))
        else:
            names = {note.name for note in new}
            part = _Part(file.keys, file.groups, file.shards)
            kept = IndexFile(encode_index([shard for shard in part.by_shard() if shard[0].name in names]), "memory")
            self._parts.append(_Part(kept.keys, kept.groups, kept.shards))
        self.shards.update({note.name: note for note in new})
        if len(self._parts) > _MAX_PARTS:
            self._concentrate()

    def places(self, key: int) -> Iterator[Place]:
        """Where rows with this key may lie."""
        for part in self._parts:
            yield from part.places(key)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Whether each of `keys` [n] is in the index, as booleans [n]."""
        found = np.zeros(len(keys), dtype=bool)
        for part in self._parts:
            at = np.minimum(np.searchsorted(part.keys, keys), len(part.keys) - 1)
            found |= part.keys[at] == keys
        return found

    def by_shard(self) -> Iterator[Shard]:
        """All shards, as `encode_index` takes them."""
        for part in self._parts:
            yield from part.by_shard()

    def distinct(self) -> int:
        """The number of distinct documents."""
        keys = np.sort(np.concatenate([part.keys for part in self._parts])) if self._parts else np.empty(0, np.uint64)
        return int(np.count_nonzero(np.diff(keys))) + 1 if len(keys) else 0

    def total(self, name: str) -> int:
        return sum(getattr(note, name) for note in self.shards.values())

    @property
    def nbytes(self) -> int:
        """Bytes of keys and row group numbers; of a memory map, only what was looked up is in memory."""
        return sum(part.keys.nbytes + part.groups.nbytes for part in self._parts)

    def _concentrate(self) -> None:
        """Merge the small parts into one, so that a look-up takes few searches; the largest stays as it is."""
        self._parts.sort(key=lambda part: len(part.keys))
        *small, largest = self._parts
        before = np.cumsum([0, *(part.begins[-1] for part in small)])
        keys = np.concatenate([part.keys for part in small])
        groups = np.concatenate([part.groups + first for part, first in zip(small, before, strict=False)])
        order = np.argsort(keys, kind="stable")
        notes = [note for part in small for note in part.notes]
        self._parts = [_Part(keys[order], groups[order], notes), largest]


def errors_of(notes: Iterable[ShardNote]) -> dict[str, Any]:
    """Measured errors of all shards together: names that begin with `max_` are maxima, others sums."""
    total: dict[str, float] = {}
    for note in notes:
        for name, value in (note.errors or {}).items():
            total[name] = max(total.get(name, 0.0), value) if name.startswith("max_") else total.get(name, 0.0) + value
    return total
