"""Documents to score offline, as pieces of token ids: from JSONL, Parquet or plain text. Used by `fill_command.py`.

A row has `tokens` or `input_ids`, or `text` for the model's tokenizer; in a `.txt` file a line is a document. What
exceeds the maximum length of a sequence continues in the next piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_service.text import Text

SUFFIXES = (".jsonl", ".parquet", ".txt")
_TOKEN_COLUMNS = ("tokens", "input_ids")
_PARQUET_ROWS = 256


@dataclass(frozen=True, eq=False)
class Piece:
    """Token ids [T] of one sequence, and how many bytes of the data have been read up to it."""

    tokens_T: np.ndarray
    bytes_read: int


@dataclass(frozen=True)
class Cutting:
    """How documents become sequences. With `special`, the tokenizer adds its special tokens."""

    max_length: int
    vocab_size: int
    special: bool = True


def find_files(data: Path) -> list[Path]:
    """The files that `data` names: itself, or those of a folder, sorted by name. ValueError if there are none."""
    files = sorted(p for p in data.rglob("*") if p.suffix in SUFFIXES) if data.is_dir() else [data]
    if not files or not all(path.is_file() for path in files):
        raise ValueError(f"no data at {data}: expected a {', '.join(SUFFIXES)} file or a folder of such files")
    if data.suffix not in SUFFIXES and not data.is_dir():
        raise ValueError(f"{data}: expected a file that ends in {', '.join(SUFFIXES)}")
    return files


def read_pieces(files: list[Path], text: Text, cutting: Cutting) -> Iterator[Piece]:
    """The sequences of all files, in order. ValueError names the place of an invalid document."""
    before = 0
    for path in files:
        rows = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _lines}[path.suffix](path)
        for place, value, read in rows:
            tokens_T = _tokens(place, value, text, cutting)
            for start in range(0, len(tokens_T), cutting.max_length):
                yield Piece(tokens_T[start : start + cutting.max_length], before + read)
        before += path.stat().st_size


def _lines(path: Path) -> Iterator[tuple[str, Any, int]]:
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            read += len(line)
            place = f"{path}, line {number}"
            try:
                words = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 ({error.reason})") from None
            if words.strip():
                yield place, words, read


def _jsonl(path: Path) -> Iterator[tuple[str, Any, int]]:
    for place, line, read in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
        column = next((name for name in (*_TOKEN_COLUMNS, "text") if name in row), None)
        if column is None:
            raise ValueError(
                f"{place}: no field {', '.join(_TOKEN_COLUMNS)} or text; it has {', '.join(row) or 'nothing'}"
            )
        yield place, row[column], read


def _parquet(path: Path) -> Iterator[tuple[str, Any, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    names = file.schema_arrow.names
    column = next((name for name in (*_TOKEN_COLUMNS, "text") if name in names), None)
    if column is None:
        raise ValueError(f"{path}: no column {', '.join(_TOKEN_COLUMNS)} or text; it has {', '.join(names)}")
    number, size, total = 0, path.stat().st_size, max(file.metadata.num_rows, 1)
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield f"{path}, row {number}", value, size * number // total


def _tokens(place: str, value: Any, text: Text, cutting: Cutting) -> np.ndarray:
    if isinstance(value, str):
        if not text.available:
            raise ValueError(f"{place}: got text, but this model has no tokenizer.json; expected token ids")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: the text holds half a surrogate pair at its character {error.start}") from None
        value = text.encode([value], cutting.special)[0]
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError(f"{place}: expected text or a list of token ids")
    if value and not 0 <= min(value) <= max(value) < cutting.vocab_size:
        raise ValueError(
            f"{place}: got token ids from {min(value)} to {max(value)}, expected 0 to {cutting.vocab_size - 1}"
        )
    return np.array(value, dtype=np.int64)
