"""Imports Parquet files into a target store: checks the teacher and the integrity of their rows, then reads them.

Called by `stillhouse-teacher pack import`. `parquet.py` describes the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_proto.errors import InvalidTargetsError, WireError
from teacher_proto.info import TeacherInfo, read_info
from teacher_proto.requests import KINDS
from teacher_proto.store.entry import Entry, pack_entry
from teacher_proto.store.parquet import FORMAT, IDS, ROWS_SHA256, SCALARS, SEALED, Packed, Pair, schema_of
from teacher_proto.store.target_store import TargetStore
from teacher_proto.targets import HIDDEN_DTYPES, TENSORS, TokenTargets, check_targets

if TYPE_CHECKING:
    import pyarrow as pa


def import_parquet(
    source: str | Path,
    store: TargetStore,
    *,
    teacher: str | None = None,
    on_entry: Callable[[], object] = lambda: None,
) -> Packed:
    """Put the entries of a Parquet file, or of all those in a folder, into `store`.

    Raises ValueError, before anything is written, for files of another format, for one that was changed since it was
    written, and for rows of a teacher other than the one with the fingerprint `teacher`, or by default those of the
    store. In older files without a sha256, a row that cannot be a teacher's targets is left out and counted.
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
            pairs = [read_row(row, teachers) for row in rows_of(batch)]
            good = [pair for pair in pairs if pair is not None]
            store.put_entries(good)
            read += len(pairs)
            entries += len(good)
            for _ in pairs:
                on_entry()
    return Packed(entries, len(paths), read - entries)


def _open(path: Path) -> tuple[Any, dict[str, TeacherInfo]]:
    """Open a file of the format; returns it and the teachers that it describes, by fingerprint."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    metadata = file.schema_arrow.metadata or {}
    if metadata.get(b"format") != FORMAT.encode() or not file.schema_arrow.remove_metadata().equals(
        schema_of([]).remove_metadata()
    ):
        raise ValueError(f"{path} does not have the format {FORMAT!r}, which `stillhouse-teacher pack` writes")
    try:
        infos = [read_info(TeacherInfo, tree) for tree in json.loads(metadata.get(b"teachers", b"[]"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} has an invalid description of a teacher: {error}") from None
    return file, {info.fingerprint: info for info in infos}


def _fingerprints(file: Any) -> list[str]:
    """The fingerprints of the teachers whose rows a file holds."""
    import pyarrow.compute as pc

    found: set[str] = set()
    for batch in file.iter_batches(columns=["fingerprint"]):
        found.update(str(value) for value in pc.unique(batch.column(0)).to_pylist())
    return sorted(found)


def _hold_against(path: Path, known: Mapping[str, TeacherInfo], teacher: str | None) -> None:
    """ValueError if a row is of a teacher that the file does not describe, or that is not an expected one."""
    file, named = _open(path)
    for fingerprint in _fingerprints(file):
        if fingerprint not in named:
            raise ValueError(
                f"{path} has rows of teacher {fingerprint}, but does not describe that teacher, only "
                f"{', '.join(named) or 'none'}: nothing was imported"
            )
        expected = {teacher} if teacher is not None else set(known) or {fingerprint}
        if fingerprint in expected:
            continue
        ours = known.get(teacher or "") or next(iter(known.values()), None)
        lines = ours.identity.difference(named[fingerprint].identity) if ours is not None else []
        raise ValueError(
            f"{path} has rows of teacher {fingerprint} ({named[fingerprint].identity.semantic.model}), expected "
            f"{', '.join(sorted(expected))}: {'; '.join(lines) or 'another teacher'}. Nothing was imported; "
            f"--teacher {fingerprint} imports them as that teacher's"
        )


def _check_unchanged(path: Path) -> None:
    """ValueError if the rows are not those that were written. Older files without a sha256 pass."""
    file, teachers = _open(path)
    if SEALED.encode() not in file.schema_arrow.metadata:
        return
    told = (file.metadata.metadata or {}).get(ROWS_SHA256.encode(), b"missing")
    digest = hashlib.sha256()
    for batch in file.iter_batches(batch_size=64):
        for row in rows_of(batch):
            pair = read_row(row, teachers)
            if pair is None:
                raise ValueError(
                    f"{path} has changed since it was written: a row has no valid targets. Nothing was imported"
                )
            digest.update(pack_entry(*pair))
    if digest.hexdigest() != told.decode():
        raise ValueError(
            f"{path} has changed since it was written: the sha256 of its rows is {digest.hexdigest()}, the one in its "
            f"footer is {told.decode()}. Nothing was imported"
        )


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch, with lists as numpy arrays."""
    for i in range(batch.num_rows):
        yield row_of(batch, i)


def row_of(batch: pa.RecordBatch, i: int) -> dict[str, Any]:
    """One row of a batch, with lists as numpy arrays."""
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        item = column[i]
        is_list = hasattr(item, "values") and item.is_valid
        row[name] = item.values.to_numpy(zero_copy_only=False) if is_list else item.as_py()
    return row


def read_row(row: dict[str, Any], teachers: dict[str, TeacherInfo]) -> Pair | None:
    """The entry and record in a row, or None if they are not valid."""
    try:
        if row["kind"] not in KINDS or not 0 <= row["start"] < row["stop"] <= len(row["tokens"]):
            return None
        tokens_T, temperatures = row["tokens"].astype(np.int64), tuple(row["temperatures"].tolist())
        entry = Entry(tokens_T=tokens_T, temperatures=temperatures, **{name: row[name] for name in SCALARS})
        targets = TokenTargets(entry.start, **_arrays(row, entry))
        teacher = teachers.get(entry.fingerprint)
        vocab_size = teacher.limits.vocab_size if teacher else 2**24 if entry.wide_ids else 65_536
        check_targets(targets, entry.query, vocab_size)
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
                raise ValueError("hidden states without a valid dtype")
            flat = np.frombuffer(flat, HIDDEN_DTYPES[entry.hidden_dtype])
        elif name in IDS:
            flat = flat.astype(np.int32 if entry.wide_ids else np.uint16)
        arrays[name] = flat.reshape(rows, len(flat) // rows) if len(spec.axes) == 2 else flat
    return arrays
