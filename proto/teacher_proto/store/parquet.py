"""Exports a target store to Parquet files: for sharing on a hub, reading with other tools, shrinking a store's file.

Called by `stillhouse-teacher pack export`; `parquet_read.py` imports such files. Target datasets' shards have the same
columns. One row is one entry of the store. A tensor is a flat row-major list, whose shape follows from `start`, `stop`
and its length; `hidden` is stored as bytes of `hidden_dtype`. A file contains the descriptions of its rows' teachers,
and the sha256 of its rows. Needs pyarrow, imported on demand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_proto.info import TeacherInfo
from teacher_proto.store.entry import Entry, pack_entry
from teacher_proto.store.target_store import TargetStore
from teacher_proto.targets import TENSORS, TokenTargets

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "stillhouse targets 1"
# ROWS_SHA256 is written to the footer after the rows. A tool that rewrites a file drops it, but keeps the schema's
# SEALED, so that its absence shows.
ROWS_SHA256, SEALED = "rows_sha256", "sealed"
_SHARD_BYTES = 256 * 2**20
_GROUP_BYTES = 16 * 2**20
SCALARS = {
    "fingerprint": "string", "kind": "string", "start": "int32", "stop": "int32", "top_k": "int32",
    "num_samples": "int32", "sample_temperature": "float64", "seed": "int64", "hidden_dtype": "string",
    "gathered": "string", "wide_ids": "bool",
}  # fmt: skip
_ELEMENTS = {"<f2": "float16", "<f4": "float32", "<i4": "int32", "<u2": "uint16"}
IDS = ("ids", "sampled_ids")
Pair = tuple[Entry, TokenTargets]


@dataclass(frozen=True)
class Packed:
    """How many entries were written or read, in how many files, and how many invalid ones were left out."""

    entries: int
    files: int
    left_out: int = 0


def export_parquet(
    store: TargetStore,
    folder: str | Path,
    *,
    shard_bytes: int = _SHARD_BYTES,
    on_entry: Callable[[], object] = lambda: None,
) -> Packed:
    """Write the entries of `store` to `folder`/targets-00000.parquet and so on, of about `shard_bytes` each.

    ValueError if there are such files already. A file gets its name only when it is complete; an export that fails or
    is stopped leaves none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if there := sorted(folder.glob("targets-*.parquet")):
        raise ValueError(f"{there[0]} already exists: export to another folder, or remove it")
    schema, entries = schema_of(store.teachers()), 0
    paths: list[Path] = []
    try:
        for shard in _pieces(_counted(store.entries(), on_entry), shard_bytes):
            paths.append(folder / f"targets-{len(paths):05d}.parquet")
            entries += _write_file(paths[-1], schema, shard)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return Packed(entries, len(paths))


def _counted(entries: Iterator[Pair], on_entry: Callable[[], object]) -> Iterator[Pair]:
    for pair in entries:
        yield pair
        on_entry()


def _pieces(entries: Iterator[Pair], size: int) -> Iterator[Iterator[Pair]]:
    """`entries` in runs of about `size` bytes, none empty. Each must be consumed before the next."""
    for first in entries:

        def run(first: Pair = first) -> Iterator[Pair]:
            total = first[1].nbytes
            yield first
            while total < size and (pair := next(entries, None)) is not None:
                total += pair[1].nbytes
                yield pair

        yield run()


def schema_of(teachers: Sequence[TeacherInfo]) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field(name, pa.type_for_alias(kind)) for name, kind in SCALARS.items()]
    fields += [pa.field("tokens", pa.list_(pa.int32())), pa.field("temperatures", pa.list_(pa.float64()))]
    for name, spec in TENSORS.items():
        element = "int32" if name in IDS else _ELEMENTS[spec.dtypes[0]]
        kind = pa.large_binary() if name == "hidden" else pa.list_(pa.type_for_alias(element))
        fields.append(pa.field(name, kind))
    described = json.dumps([info.model_dump(mode="json") for info in teachers])
    return pa.schema(fields, metadata={"format": FORMAT, "teachers": described, SEALED: "1"})


def _write_file(path: Path, schema: pa.Schema, entries: Iterator[Pair]) -> int:
    """Write one file, a row group at a time, and return the number of its entries."""
    import pyarrow.parquet as pq

    part, count, digest = path.with_suffix(".part"), 0, hashlib.sha256()
    try:
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            for group in _pieces(entries, _GROUP_BYTES):
                pairs = list(group)
                for pair in pairs:
                    digest.update(pack_entry(*pair))
                writer.write_table(table_of([as_row(*pair) for pair in pairs], schema))
                count += len(pairs)
            writer.add_key_value_metadata({ROWS_SHA256: digest.hexdigest()})
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def table_of(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of rows, which are dicts by column name."""
    import pyarrow as pa

    columns = [pa.array([row[field.name] for row in rows], type=field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def as_row(entry: Entry, targets: TokenTargets) -> dict[str, Any]:
    """An entry and its record as a row: values for the columns of `schema_of`."""
    row: dict[str, Any] = {name: getattr(entry, name) for name in SCALARS}
    row |= {"tokens": entry.tokens_T.astype(np.int32), "temperatures": list(entry.temperatures)}
    for name in TENSORS:
        array = getattr(targets, name)
        if name == "hidden":
            row[name] = None if array is None else np.ascontiguousarray(array).tobytes()
        else:
            row[name] = None if array is None else array.reshape(-1)
    return row
