"""Indexes files into one memory-mapped Arrow file: any document in microseconds, none held in memory.

Called by `random_access` for files that are not streamed. The Arrow file is named by a hash of its inputs, so changed
files are indexed again and unchanged ones open at once.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import datasets
import filelock
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from student_trainer.data.content import Content, ContentHasher, keep, kept_at, state_of
from student_trainer.data.files import DataFile, find_files
from student_trainer.data.records import read_tables
from student_trainer.settings.data import SourceSettings
from teacher_proto.process.stages import Stage, stage

logger = logging.getLogger(__name__)
VERSION = 1
SHAPES_THE_INDEX = (
    "kind",
    "format",
    "column",
    "tools_column",
    "template",
    "document",
    "encoding_errors",
    "bad_documents",
)


def cache_root(folder: str | None) -> Path:
    """The folder of the indexes: the setting, or else one in the cache of `datasets`."""
    return Path(folder) if folder else Path(datasets.config.HF_DATASETS_CACHE) / "stillhouse"


def open_index(name: str, settings: SourceSettings, cache_folder: str | None) -> datasets.Dataset:
    """The documents of a file source as a memory-mapped data set with the column `document`, and `weight` if the
    settings name a weight column.
    """
    files = find_files(settings)
    folder = cache_root(cache_folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_digest(files, settings)}.arrow"
    # One process writes the index while the others wait for it.
    with stage(f"waiting for another process that may be indexing source {name!r}"), filelock.FileLock(f"{path}.lock"):
        if path.exists():
            try:
                return datasets.Dataset.from_file(str(path))
            except (pa.ArrowInvalid, OSError) as error:
                logger.warning("the index of source %r in %s is damaged (%s): it is made again", name, path, error)
        _sweep(folder, path.stem)
        content = _write(name, path, files, settings)
        dataset = datasets.Dataset.from_file(str(path))
        if settings.weight_column is None:  # weights are content too: with them, `content_of` hashes both columns
            keep(kept_at(dataset, folder), state_of([path]), content)
    return dataset


def _sweep(folder: Path, ours: str) -> None:
    """Remove partial files of killed processes. Only the holder of an index's lock writes it, and we hold `ours`."""
    for left in folder.glob("*.partial"):
        digest = left.name.partition(".")[0]
        lock = filelock.FileLock(folder / f"{digest}.arrow.lock", timeout=0)
        # A held lock belongs to a live process that is still writing.
        with suppress(filelock.Timeout), nullcontext() if digest == ours else lock:
            left.unlink(missing_ok=True)


def _digest(files: list[DataFile], settings: SourceSettings) -> str:
    shape = {field: getattr(settings, field) for field in SHAPES_THE_INDEX}
    if settings.weight_column is not None:
        shape["weight_column"] = settings.weight_column
    made_from = [VERSION, shape, [(file.url, file.size, file.version) for file in files]]
    return hashlib.blake2b(json.dumps(made_from).encode(), digest_size=16).hexdigest()


def _write(name: str, path: Path, files: list[DataFile], settings: SourceSettings) -> Content:
    began = time.monotonic()
    size = sum(file.size for file in files)
    logger.info("indexing source %r: %d files, %.1f MB; once, into %s", name, len(files), size / 1e6, path.parent)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with stage(f"indexing source {name!r}", size / 1e6, "MB", closing=False) as doing:
            content = _write_tables(partial, _tables(files, settings, doing))
        if content.count == 0:
            raise ValueError(
                f"source {name!r} holds no documents: {len(files)} files, {size} bytes, "
                f"the first is {files[0].url}; give files with content"
            )
        # An atomic rename: the final name never refers to a partial index.
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    logger.info("indexed source %r: %d documents in %.1f s", name, content.count, time.monotonic() - began)
    return content


def _tables(files: list[DataFile], settings: SourceSettings, doing: Stage) -> Iterator[pa.Table]:
    """The tables of all files. Progress is estimated from the tables' sizes, and corrected at the end of each file."""
    before = 0
    for file in files:
        for table in read_tables(file, settings):
            yield table
            doing.done = min(doing.done + table.nbytes / 1e6, (before + file.size) / 1e6)
        before += file.size
        doing.done = before / 1e6


def _write_tables(path: Path, tables: Iterator[pa.Table]) -> Content:
    hasher, any_written = ContentHasher(), False
    with ArrowWriter(path=str(path)) as writer:
        for table in tables:
            if len(table):
                writer.write_table(table)
                hasher.add(table.column("document"))
                any_written = True
        if any_written:
            writer.finalize()
    return hasher.finish()
