"""Documents in units, each of which becomes a shard: the same data gives the same units in every process.

Used by `fill_command.py`, `dataset_fill.py` and `ray_fill.py`. Units depend only on the data and the unit size, not on
what is filled already, so that processes which know nothing of each other can share the work by number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from teacher_service.offline.documents import Piece


@dataclass(frozen=True, eq=False)
class Unit:
    """Token ids of distinct documents, in order. `num_bytes` is the size of the data read for it, repeats included."""

    number: int
    documents: tuple[np.ndarray, ...]
    num_bytes: int
    repeats: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))


def read_units(pieces: Iterator[Piece], tokens: int) -> Iterator[Unit]:
    """Units of at least `tokens`, but for the last. Repeats are left out, which takes 60 bytes of memory a document."""
    seen: set[int] = set()
    documents: list[np.ndarray] = []
    number = size = repeats = read = before = 0
    for piece in pieces:
        read = piece.bytes_read
        tokens_T = np.ascontiguousarray(piece.tokens_T, dtype="<i8")
        key = int.from_bytes(hashlib.blake2b(tokens_T.tobytes(), digest_size=8).digest(), "little")
        if key in seen:
            repeats += 1
            continue
        seen.add(key)
        documents.append(tokens_T)
        size += len(tokens_T)
        if size >= tokens:
            yield Unit(number, tuple(documents), read - before, repeats)
            documents, size, repeats, number, before = [], 0, 0, number + 1, read
    if documents or repeats:
        yield Unit(number, tuple(documents), read - before, repeats)
