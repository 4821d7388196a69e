"""Lists the documents that a run will request targets for. Used by `cli.sequences` and `targets.missing`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from student_trainer.batch.batch import Batch, counted_rows
from student_trainer.data.loader import BatchSource
from student_trainer.data.mixture import MixtureState
from student_trainer.data.stream import BatchStream
from teacher_proto.process.stages import stage

Key = str
Tokens = list[int]


def documents_ahead(
    source: BatchSource, state: MixtureState, steps: int, evaluates: bool
) -> Iterator[tuple[Key, Tokens]]:
    """Name and token ids of every held-out document, if the run evaluates, and of every document in the `steps` batches
    from `state` on; in order and with repeats. Only for a mixture whose weights do not depend on losses.
    """
    if evaluates:
        for name in source.names:
            with stage(f"reading the held-out documents of {name!r}"):
                batches = source.held_out(name)
            for batch in batches:
                yield from _asked(batch)
    with stage("reading batches", steps, "batches") as doing, BatchStream(source, state) as stream:
        for _ in range(steps):
            batch, _ = next(stream)
            yield from _asked(batch)
            doing.done += 1


def distinct(documents: Iterable[tuple[Key, Tokens]]) -> Iterator[tuple[Key, Tokens]]:
    """Documents without repeats, by their tokens. Only a 16-byte hash of each is kept: there may be many millions."""
    seen: set[bytes] = set()
    for key, ids in documents:
        # A store looks documents up by their tokens.
        digest = hashlib.blake2b(np.array(ids, dtype="<i8").tobytes(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield key, ids


def _asked(batch: Batch) -> Iterator[tuple[Key, Tokens]]:
    for document in batch.documents:
        if counted_rows(batch, document) is not None:
            yield document.key, batch.tokens_BT[document.row, document.start : document.stop].tolist()
