"""The files of a dataset: reads its index files, lists its shards, checks that they agree, and finds files left by
killed writers. Used by `dataset.py` when it opens one, by `check.py` and by `stillhouse-teacher dataset check`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from teacher_proto.dataset.folder import Folder
from teacher_proto.dataset.index import Index, IndexFile

log = logging.getLogger(__name__)
SHARDS, INDEX = "shards", "index"
SHARD_PREFIX, SHARD_SUFFIX = "targets-", ".parquet"
MERGED, INDEX_SUFFIX = "merged-", ".idx"
_WRITTEN = ("", SHARDS, INDEX)


def open_files(folder: Folder, cache: Path) -> Index:
    """The union of all index files."""
    for attempt in range(5):
        names = folder.list(INDEX)
        merged = sorted((name for name in names if name.startswith(MERGED)), key=lambda name: -names[name])
        singles = [name for name in names if name.endswith(INDEX_SUFFIX) and not name.startswith(MERGED)]
        try:
            index = Index(_open_index(folder, name, cache) for name in merged)
            for name in sorted(singles):
                if name.removesuffix(INDEX_SUFFIX) + SHARD_SUFFIX not in index.shards:
                    index.add(_open_index(folder, name, cache))
        except FileNotFoundError:
            # A concurrent merge has replaced this file with a larger one.
            if attempt == 4:
                raise
        else:
            return index
    raise AssertionError


def shards_there(folder: Folder) -> dict[str, int]:
    """Names and sizes of the existing shards."""
    return {
        name: size
        for name, size in folder.list(SHARDS).items()
        if name.startswith(SHARD_PREFIX) and name.endswith(SHARD_SUFFIX)
    }


def unfinished_files(folder: Folder) -> list[str]:
    """Names, relative to the folder, of temporary files of running or killed writers."""
    return [_named(below, name) for below in _WRITTEN for name in sorted(folder.unfinished(below))]


def remove_unfinished(folder: Folder) -> list[str]:
    """Remove those that have not been written to for an hour; safe while others write."""
    return [_named(below, name) for below in _WRITTEN for name in sorted(folder.remove_unfinished(below))]


def _named(below: str, name: str) -> str:
    return f"{below}/{name}" if below else name


def read_index(folder: Folder, cache: Path) -> tuple[Index, list[str]]:
    """The index, and the names of shards that are not in it. ValueError if a shard in the index is missing or has
    another size.
    """
    index = open_files(folder, cache)
    there = shards_there(folder)
    if faults := faults_of(folder, index, there):
        raise ValueError(faults[0] + (f" ({len(faults)} shards in total)" if len(faults) > 1 else ""))
    return index, sorted(there.keys() - index.shards.keys())


def _open_index(folder: Folder, name: str, cache: Path) -> IndexFile:
    """Open an index file. A bucket's merged index, which may be large, is copied to this disk and memory-mapped."""
    place = f"{folder.url}/{INDEX}/{name}"
    if folder.local:
        return IndexFile(np.memmap(folder.local_path(f"{INDEX}/{name}"), np.uint8, "r"), place)
    if not name.startswith(MERGED):
        return IndexFile(folder.read(f"{INDEX}/{name}"), place)
    kept = cache / name
    if kept.exists():
        # A damaged copy says nothing about the file in the bucket.
        with contextlib.suppress(ValueError, OSError):
            return IndexFile(np.memmap(kept, np.uint8, "r"), place)
    data = folder.read(f"{INDEX}/{name}")
    try:
        Folder(str(cache), outage_s=0.0).write(name, data)
    except OSError as error:
        log.warning("%s can't be written (%s): the index is in memory", kept, error)
        return IndexFile(data, place)
    return IndexFile(np.memmap(kept, np.uint8, "r"), place)


def faults_of(folder: Folder, index: Index, there: Mapping[str, int]) -> list[str]:
    """Faults of the shards in the index, by name and size, each with what to do."""
    again = (
        f"remove its files in {folder.url}/{INDEX}, also `{MERGED}` ones, run `stillhouse-teacher dataset merge` and "
        "fill again"
    )
    faults = []
    for name, note in index.shards.items():
        place, size = f"{folder.url}/{SHARDS}/{name}", there.get(name)
        if size is None:
            faults.append(f"{place} with {note.tokens} tokens is missing: restore it, or {again}")
        elif size < note.bytes:
            faults.append(f"{place} is truncated to {size} of {note.bytes} bytes: remove it, {again}")
        elif size > note.bytes:
            faults.append(
                f"{place} has {size} bytes, but its index says {note.bytes}: the index is older than its shard; remove "
                f"the files in {folder.url}/{INDEX} and run `stillhouse-teacher dataset merge`"
            )
    return faults
