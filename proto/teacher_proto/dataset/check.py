"""Maintenance of a dataset: checks its integrity, merges its index files, and counts what is in it.

Called by `stillhouse-teacher dataset check | merge | stats`.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from teacher_proto.dataset.folder import Folder
from teacher_proto.dataset.index import Index, Shard, ShardNote, document_key, encode_index, errors_of
from teacher_proto.dataset.listing import INDEX, MERGED, SHARDS, faults_of, open_files, shards_there
from teacher_proto.dataset.manifest import Manifest, find_manifest, no_dataset
from teacher_proto.dataset.shards import Rows, check_owner, note_shard, open_shard, rows_sha256
from teacher_proto.store.entry import pack_entry, sequence_key


@dataclass(frozen=True)
class DatasetStats:
    """Totals over all shards in the index; `without_index` counts the shards that are not. `twice`: documents that are
    in two shards. `errors`: means per row, and maxima, as measured by the codec when it wrote.
    """

    manifest: Manifest
    shards: int
    documents: int
    twice: int
    rows: int
    tokens: int
    bytes: int
    without_index: int
    errors: dict[str, float]


def manifest_of(folder: Folder) -> Manifest:
    """The manifest of the dataset at `folder`. ValueError if there is none."""
    manifest = find_manifest(folder)
    if manifest is None:
        raise no_dataset(folder)
    return manifest


def dataset_stats(folder: Folder) -> DatasetStats:
    """What is in a dataset, from its index only."""
    manifest = manifest_of(folder)
    with tempfile.TemporaryDirectory() as cache:
        index = open_files(folder, Path(cache))
        total = errors_of(index.shards.values())
        rows = index.total("rows")
        known = index.total("documents")
        errors = {name: value if name.startswith("max_") else value / rows for name, value in total.items()}
        return DatasetStats(
            manifest, len(index.shards), known, known - index.distinct(), rows, index.total("tokens"),
            index.total("bytes"), len(shards_there(folder).keys() - index.shards.keys()), errors,
        )  # fmt: skip


def check_dataset(folder: Folder, on_shard: Callable[[], object] = lambda: None) -> Iterator[str]:
    """Yield one line per fault; reads every byte of every shard. ValueError unless there is exactly one manifest."""
    manifest = manifest_of(folder)
    with tempfile.TemporaryDirectory() as cache:
        index, there = open_files(folder, Path(cache)), shards_there(folder)
        yield from faults_of(folder, index, there)
        for name in sorted(there.keys() - index.shards.keys()):
            yield (
                f"{folder.url}/{SHARDS}/{name} is in no index: its targets count as missing until `stillhouse-teacher "
                f"dataset merge {folder.url}` adds it"
            )
        for name in sorted(there.keys() & index.shards.keys()):
            if there[name] == index.shards[name].bytes:
                yield from _check_shard(folder, manifest, index, index.shards[name])
            on_shard()


def _check_shard(folder: Folder, manifest: Manifest, index: Index, note: ShardNote) -> Iterator[str]:
    place = f"{folder.url}/{SHARDS}/{note.name}"
    data = folder.read(f"{SHARDS}/{note.name}")
    if hashlib.sha256(data).hexdigest() != note.sha256:
        yield f"{place} has changed since it was written: its sha256 is not the one in its index"
        return
    try:
        with open_shard(io.BytesIO(data), place) as file:
            digest = hashlib.sha256()
            for group in range(file.metadata.num_row_groups):
                for entry, targets in Rows(file, group, manifest, place).all():
                    if manifest.codec["name"] == "lossless":
                        digest.update(pack_entry(entry, targets))
                    key = document_key(sequence_key(entry.fingerprint, entry.tokens_T))
                    if not any(p.shard.name == note.name and p.group == group for p in index.places(key)):
                        yield f"{place}, row group {group}: a document is not where the index says it is"
                        return
            if manifest.codec["name"] == "lossless" and digest.hexdigest() != rows_sha256(file):
                yield f"{place} has changed since it was written: the sha256 of its rows is not the one in its footer"
    except ValueError as error:
        yield str(error)


def merge_dataset(folder: Folder, others: Sequence[Folder] = (), on_shard: Callable[[], object] = lambda: None) -> int:
    """Merge all index files into one, adding shards without an index and copying those of `others`; returns the number
    of shards in it. ValueError for a dataset with another manifest, or a file that is not a shard of it.
    """
    manifest = manifest_of(folder)
    for other in others:
        theirs = manifest_of(other)
        if theirs.digest != manifest.digest:
            raise ValueError(f"{folder.url} and {other.url} are different datasets: {manifest.difference(theirs)}")
        _copy(other, folder, on_shard)
    with tempfile.TemporaryDirectory() as cache:
        before = [name for name in folder.list(INDEX) if name.startswith(MERGED)]
        index, there = open_files(folder, Path(cache)), shards_there(folder)
        if faults := faults_of(folder, index, there):
            raise ValueError(faults[0])
        shards = list(index.by_shard())
        for name in sorted(there.keys() - index.shards.keys()):
            shards.append(_note(folder, manifest, name))
            on_shard()
        if not shards:
            return 0
        shards.sort(key=lambda shard: shard[0].name)
        data = encode_index(shards)
    name = f"{MERGED}{hashlib.sha256(data).hexdigest()[:24]}.idx"
    folder.write(f"{INDEX}/{name}", data)
    for old in before:
        if old != name:
            folder.remove(f"{INDEX}/{old}")
    return len(shards)


def _note(folder: Folder, manifest: Manifest, name: str) -> Shard:
    data, place = folder.read(f"{SHARDS}/{name}"), f"{folder.url}/{SHARDS}/{name}"
    with open_shard(io.BytesIO(data), place) as file:
        check_owner(file, manifest, place)
    return note_shard(data, name)


def _copy(source: Folder, target: Folder, on_shard: Callable[[], object]) -> None:
    """Copy the shards that `target` lacks, each before its index."""
    with tempfile.TemporaryDirectory() as cache:
        theirs, ours = open_files(source, Path(cache)), open_files(target, Path(cache) / "ours")
        for shard in theirs.by_shard():
            name = shard[0].name
            if name not in ours.shards:
                target.write(f"{SHARDS}/{name}", source.read(f"{SHARDS}/{name}"))
                target.write(f"{INDEX}/{name.removesuffix('.parquet')}.idx", encode_index([shard]))
            on_shard()
