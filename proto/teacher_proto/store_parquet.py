"""A target store as Parquet files and back: for sharing on a hub, reading with other tools, shrinking a store's file.

`stillhouse-teacher pack` calls it. One row is one entry of the store. A tensor is a flat list, row-major, whose shape
follows from `start`, `stop` and its length; `hidden` is its bytes, of `hidden_dtype`. A file names the teachers of its
rows, and the sha256 of all of them. Needs pyarrow, on demand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_proto.errors import InvalidTargetsError, WireError
from teacher_proto.info import TeacherInfo, parse_info
from teacher_proto.requests import KINDS
from teacher_proto.store import TargetStore
from teacher_proto.store_entry import Entry, pack_entry
from teacher_proto.targets import HIDDEN_DTYPES, TENSORS, TokenTargets, check_targets

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "stillhouse targets 1"
# In the footer, known when all rows are written. Whoever reads a file and writes it again loses it, and keeps SEALED.
ROWS_SHA256, SEALED = "rows_sha256", "sealed"
_SHARD_BYTES = 256 * 2**20
_GROUP_BYTES = 16 * 2**20
_SCALARS = {
    "fingerprint": "string", "kind": "string", "start": "int32", "stop": "int32", "top_k": "int32",
    "num_samples": "int32", "sample_temperature": "float64", "seed": "int64", "hidden_dtype": "string",
    "gathered": "string", "wide_ids": "bool",
}  # fmt: skip
_ELEMENTS = {"<f2": "float16", "<f4": "float32", "<i4": "int32", "<u2": "uint16"}
_IDS = ("ids", "sampled_ids")
Pair = tuple[Entry, TokenTargets]


@dataclass(frozen=True)
class Packed:
    """How many entries were written or read, in how many files; and how many were left out since they can't be."""

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

    ValueError if there are such files already. A file has its name only when it is whole; an export that fails or is
    stopped leaves none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if there := sorted(folder.glob("targets-*.parquet")):
        raise ValueError(f"{there[0]} is there already: export to another folder, or remove it")
    schema, entries = _schema(store.teachers()), 0
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


def import_parquet(
    source: str | Path,
    store: TargetStore,
    *,
    teacher: str | None = None,
    on_entry: Callable[[], object] = lambda: None,
) -> Packed:
    """Put the entries of a Parquet file, or of all those in a folder, into `store`.

    ValueError, before anything is put, for files of another format, for one that was changed since it was written, and
    for rows of another teacher than `teacher` names by its fingerprint, or else than the store has. A row that cannot
    be a teacher's answer is left out and counted, in files that don't say what they held.
    """
    source = Path(source)
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not paths or not paths[0].exists():
        raise ValueError(f"there are no Parquet files at {source}")
    known = {info.fingerprint: info for info in store.teachers()}
    for path in paths:
        _hold_against(path, known, teacher)
    for path in paths:
        _check_unchanged(path)
    read = entries = 0
    for path in paths:
        file, teachers = _open(path)
        for fingerprint in _fingerprints(file):
            store.remember(teachers[fingerprint])
        for batch in file.iter_batches(batch_size=64):
            pairs = [_read_row(row, teachers) for row in _rows(batch)]
            good = [pair for pair in pairs if pair is not None]
            store.put_entries(good)
            read += len(pairs)
            entries += len(good)
            for _ in pairs:
                on_entry()
    return Packed(entries, len(paths), read - entries)


def _counted(entries: Iterator[Pair], on_entry: Callable[[], object]) -> Iterator[Pair]:
    for pair in entries:
        yield pair
        on_entry()


def _pieces(entries: Iterator[Pair], size: int) -> Iterator[Iterator[Pair]]:
    """`entries` cut into runs of about `size` bytes, each read to its end before the next; none is empty."""
    for first in entries:

        def run(first: Pair = first) -> Iterator[Pair]:
            total = first[1].nbytes
            yield first
            while total < size and (pair := next(entries, None)) is not None:
                total += pair[1].nbytes
                yield pair

        yield run()


def _schema(teachers: Sequence[TeacherInfo]) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field(name, pa.type_for_alias(kind)) for name, kind in _SCALARS.items()]
    fields += [pa.field("tokens", pa.list_(pa.int32())), pa.field("temperatures", pa.list_(pa.float64()))]
    for name, spec in TENSORS.items():
        element = "int32" if name in _IDS else _ELEMENTS[spec.dtypes[0]]
        kind = pa.large_binary() if name == "hidden" else pa.list_(pa.type_for_alias(element))
        fields.append(pa.field(name, kind))
    described = json.dumps([info.model_dump(mode="json") for info in teachers])
    return pa.schema(fields, metadata={"format": FORMAT, "teachers": described, SEALED: "1"})


def _write_file(path: Path, schema: pa.Schema, entries: Iterator[Pair]) -> int:
    """Write one file, a group of rows at a time; the number of its entries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part, count, digest = path.with_suffix(".part"), 0, hashlib.sha256()
    try:
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            for group in _pieces(entries, _GROUP_BYTES):
                pairs = list(group)
                for pair in pairs:
                    digest.update(pack_entry(*pair))
                rows = [_as_row(entry, targets) for entry, targets in pairs]
                columns = [pa.array([row[field.name] for row in rows], type=field.type) for field in schema]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                count += len(rows)
            writer.add_key_value_metadata({ROWS_SHA256: digest.hexdigest()})
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _as_row(entry: Entry, targets: TokenTargets) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(entry, name) for name in _SCALARS}
    row |= {"tokens": entry.tokens_T.astype(np.int32), "temperatures": list(entry.temperatures)}
    for name in TENSORS:
        array = getattr(targets, name)
        if name == "hidden":
            row[name] = None if array is None else np.ascontiguousarray(array).tobytes()
        else:
            row[name] = None if array is None else array.reshape(-1)
    return row


def _open(path: Path) -> tuple[Any, dict[str, TeacherInfo]]:
    """A file of the format, and the teachers that it names, by fingerprint."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    metadata = file.schema_arrow.metadata or {}
    if metadata.get(b"format") != FORMAT.encode() or not file.schema_arrow.remove_metadata().equals(
        _schema([]).remove_metadata()
    ):
        raise ValueError(f"{path} does not hold {FORMAT!r}: `stillhouse-teacher pack` writes such files")
    try:
        infos = [parse_info(tree) for tree in json.loads(metadata.get(b"teachers", b"[]"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} names a teacher that is none: {error}") from None
    return file, {info.fingerprint: info for info in infos}


def _fingerprints(file: Any) -> list[str]:
    """Whose rows a file holds."""
    import pyarrow.compute as pc

    found: set[str] = set()
    for batch in file.iter_batches(columns=["fingerprint"]):
        found.update(str(value) for value in pc.unique(batch.column(0)).to_pylist())
    return sorted(found)


def _hold_against(path: Path, known: Mapping[str, TeacherInfo], teacher: str | None) -> None:
    """ValueError if a row is of a teacher that the file does not name, or that is not the one that is expected."""
    file, named = _open(path)
    for fingerprint in _fingerprints(file):
        if fingerprint not in named:
            raise ValueError(
                f"{path} has rows of teacher {fingerprint} and does not say who that is; it names "
                f"{', '.join(named) or 'nobody'}: nothing was imported"
            )
        expected = {teacher} if teacher is not None else set(known) or {fingerprint}
        if fingerprint in expected:
            continue
        ours = known.get(teacher or "") or next(iter(known.values()), None)
        lines = ours.identity.difference(named[fingerprint].identity) if ours is not None else []
        raise ValueError(
            f"{path} has rows of teacher {fingerprint} ({named[fingerprint].identity.semantic.model}), expected is "
            f"{', '.join(sorted(expected))}: {'; '.join(lines) or 'another teacher'}. Nothing was imported; "
            f"--teacher {fingerprint} takes them as that teacher's own"
        )


def _check_unchanged(path: Path) -> None:
    """ValueError if the rows are not those that were written; one of the first edition's files does not say."""
    file, teachers = _open(path)
    if SEALED.encode() not in file.schema_arrow.metadata:
        return
    told = (file.metadata.metadata or {}).get(ROWS_SHA256.encode(), b"not there any more")
    digest = hashlib.sha256()
    for batch in file.iter_batches(batch_size=64):
        for row in _rows(batch):
            pair = _read_row(row, teachers)
            if pair is None:
                raise ValueError(f"{path} was changed since it was written: a row is no answer. Nothing was imported")
            digest.update(pack_entry(*pair))
    if digest.hexdigest() != told.decode():
        raise ValueError(
            f"{path} was changed since it was written: the sha256 of its rows is {digest.hexdigest()}, it says "
            f"{told.decode()}. Nothing was imported"
        )


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch, lists as numpy arrays."""
    for i in range(batch.num_rows):
        row: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            item = column[i]
            is_list = name not in _SCALARS and name != "hidden" and item.is_valid
            row[name] = item.values.to_numpy(zero_copy_only=False) if is_list else item.as_py()
        yield row


def _read_row(row: dict[str, Any], teachers: dict[str, TeacherInfo]) -> Pair | None:
    """The entry that a row holds, or None if it cannot be one."""
    try:
        if row["kind"] not in KINDS or not 0 <= row["start"] < row["stop"] <= len(row["tokens"]):
            return None
        tokens_T, temperatures = row["tokens"].astype(np.int64), tuple(row["temperatures"].tolist())
        entry = Entry(tokens_T=tokens_T, temperatures=temperatures, **{name: row[name] for name in _SCALARS})
        targets = TokenTargets(entry.start, **_arrays(row, entry))
        teacher = teachers.get(entry.fingerprint)
        vocab_size = teacher.limits.vocab_size if teacher else 2**24 if entry.wide_ids else 65_536
        check_targets(
            targets, kinds=(entry.kind,), rows=(entry.start, entry.stop), top_k=entry.top_k,
            num_temperatures=len(temperatures), vocab_size=vocab_size,
            sequence_length=len(tokens_T), temperatures=temperatures, num_samples=entry.num_samples or None,
            hidden_dtype=entry.hidden_dtype, tokens_T=tokens_T,
        )  # fmt: skip
    except (InvalidTargetsError, WireError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return entry, targets


def _arrays(row: dict[str, Any], entry: Entry) -> dict[str, np.ndarray]:
    rows, arrays = entry.stop - entry.start, {}
    for name, spec in TENSORS.items():
        flat = row[name]
        if flat is None:
            continue
        if name == "hidden":
            if entry.hidden_dtype not in HIDDEN_DTYPES:
                raise ValueError("hidden states of no dtype")
            flat = np.frombuffer(flat, HIDDEN_DTYPES[entry.hidden_dtype])
        elif name in _IDS:
            flat = flat.astype(np.int32 if entry.wide_ids else np.uint16)
        arrays[name] = flat.reshape(rows, len(flat) // rows) if len(spec.axes) == 2 else flat
    return arrays
