"""Reads documents from files: text, JSON lines and Parquet. Used by `index` and `streamed`.

A reader takes a file, the source's settings and the index of a first document. It yields tables with a column
`document`: the text, the conversation or example as JSON, or the token ids; for Parquet with `weight_column`, also a
column `weight`. Every error names the file and, for JSON lines, the line.
"""

import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from student_trainer.data.files import DataFile, chunks, decode, open_file
from student_trainer.settings.data import SourceSettings

logger = logging.getLogger(__name__)
PARQUET_ROWS = 1024
DOCUMENT_TYPE = {
    "text": pa.string(),
    "chat": pa.string(),
    "tokens": pa.list_(pa.int32()),
    "classification": pa.string(),
}
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, pa.ArrowInvalid, lzma.LZMAError, zlib.error)


def read_tables(file: DataFile, settings: SourceSettings, start: int = 0) -> Iterator[pa.Table]:
    """Tables of one file from document `start` on. ValueError with the file's name if it cannot be read."""
    try:
        yield from READERS[settings.kind](file, settings, start)
    except UNREADABLE as error:
        raise ValueError(
            f"cannot read {file.url} as {settings.kind}: {type(error).__name__}: {error}; "
            "is the file complete, and do its kind and compression match its name?"
        ) from error


def _table(documents: list[Any], format: str) -> pa.Table:
    return pa.table({"document": pa.array(documents, DOCUMENT_TYPE[format])})


def _skip_rows(tables: Iterator[pa.Table], start: int) -> Iterator[pa.Table]:
    for table in tables:
        if start < len(table):
            yield table.slice(start)
        start = max(0, start - len(table))


def _read_text(file: DataFile, settings: SourceSettings, start: int) -> Iterator[pa.Table]:
    if settings.document == "file":
        with open_file(file, settings) as binary:
            yield from _skip_rows(iter([_table([decode(binary.read(), settings)], "text")]), start)
        return
    separator = b"\n" if settings.document == "line" else b"\n\n"

    def tables() -> Iterator[pa.Table]:
        for chunk, _ in chunks(file, settings, separator):
            parts = chunk.replace(b"\r\n", b"\n").split(separator)
            yield _table([decode(part, settings) for part in parts if part.strip()], "text")

    yield from _skip_rows(tables(), start)


def _read_jsonl(file: DataFile, settings: SourceSettings, start: int) -> Iterator[pa.Table]:
    def tables() -> Iterator[pa.Table]:
        for chunk, line in chunks(file, settings, b"\n"):
            table = _parse_arrow(chunk, settings)
            yield _parse_lines(chunk, line, file, settings) if table is None else table

    yield from _skip_rows(tables(), start)


def _read_parquet(file: DataFile, settings: SourceSettings, start: int) -> Iterator[pa.Table]:
    columns = list(dict.fromkeys(filter(None, (*settings.columns, settings.weight_column))))
    with fsspec.open(file.url, "rb", **settings.storage_options) as binary:
        parquet = pa.parquet.ParquetFile(binary)
        for name in columns:
            if name not in parquet.schema_arrow.names:
                raise ValueError(no_column(file.url, name, parquet.schema_arrow.names))
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if start < rows:
                batches = parquet.iter_batches(PARQUET_ROWS, [group], columns)
                yield from _skip_rows((_from_columns(b, file, settings) for b in batches), start)
            start = max(0, start - rows)


def _from_columns(batch: pa.RecordBatch, file: DataFile, settings: SourceSettings) -> pa.Table:
    table = _documents_of(batch, file, settings)
    if settings.weight_column is None:
        return table
    try:
        return table.append_column("weight", batch.column(settings.weight_column).cast(pa.float64()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        kind = batch.column(settings.weight_column).type
        raise ValueError(f"{file.url}: column {settings.weight_column!r} is {kind}, expected numbers") from error


def _documents_of(batch: pa.RecordBatch, file: DataFile, settings: SourceSettings) -> pa.Table:
    if settings.is_record:
        return _table([record_json(row, settings) for row in batch.to_pylist()], settings.format)
    column = batch.column(settings.column_name)
    if column.null_count:
        raise ValueError(f"{file.url}: {column.null_count} rows have no {settings.column_name!r}; drop or fill them")
    try:
        return pa.table({"document": column.cast(DOCUMENT_TYPE[settings.format])})
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{file.url}: column {settings.column_name!r} is {column.type}, expected "
            f"{DOCUMENT_TYPE[settings.format]} for format {settings.format!r}"
        ) from error


READERS: dict[str, Callable[[DataFile, SourceSettings, int], Iterator[pa.Table]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _parse_arrow(chunk: bytes, settings: SourceSettings) -> pa.Table | None:
    """The fast path for text and token ids, which parses only the needed field. None if `_parse_lines` is needed."""
    if settings.is_record or not chunk.strip():
        return None
    schema = pa.schema([(settings.column_name, DOCUMENT_TYPE[settings.format])])
    try:
        table = pa.json.read_json(
            io.BytesIO(chunk),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=len(chunk) + 1),
            parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        ).select([settings.column_name])
        table.validate(full=True)  # the parser accepts invalid UTF-8
    except pa.ArrowInvalid:
        return None
    if table.column(0).null_count or any(c.values.null_count for c in table.column(0).chunks if hasattr(c, "values")):
        return None
    return table.rename_columns(["document"])


def _parse_lines(chunk: bytes, first: int, file: DataFile, settings: SourceSettings) -> pa.Table:
    documents = []
    for number, line in enumerate(chunk.split(b"\n"), start=first):
        if not line.strip():
            continue
        try:
            documents.append(_parse_line(line, f"{file.url}, line {number}", settings))
        except ValueError as error:
            if settings.bad_documents == "stop":
                raise
            logger.warning("%s. Skipping it", error)
    return _table(documents, settings.format)


def _parse_line(line: bytes, place: str, settings: SourceSettings) -> Any:
    try:
        row = json.loads(decode(line, settings))
    except ValueError as error:
        shown = line[:80].decode("utf-8", "replace")
        raise ValueError(f"{place}: not JSON ({error}): {shown!r}; expected one JSON object per line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: got a JSON {type(row).__name__}, expected an object")
    if row.get(settings.column_name) is None:
        raise ValueError(no_column(place, settings.column_name, list(row)))
    if settings.is_record:
        return record_json(row, settings)
    value = row[settings.column_name]
    if settings.format == "text":
        if not isinstance(value, str):
            raise ValueError(f"{place}: {settings.column_name!r} is {type(value).__name__}, expected a string")
        try:
            return value.encode("utf-8", "surrogatepass").decode("utf-8", settings.encoding_errors)
        except UnicodeDecodeError as error:
            what = f"{place}: {settings.column_name!r} contains half a surrogate pair"
            raise ValueError(f"{what}; repair it, or set encoding_errors: replace") from error
    if not isinstance(value, list) or any(type(i) is not int or not 0 <= i < 2**31 for i in value):
        raise ValueError(f"{place}: {settings.column_name!r} is not a list of token ids (integers from 0 to 2^31 - 1)")
    return value


def record_json(row: dict[str, Any], settings: SourceSettings) -> str:
    """A conversation or an example as the JSON string that the index stores."""
    return json.dumps(record_content(row, settings), ensure_ascii=False)


def record_content(row: dict[str, Any], settings: SourceSettings) -> dict[str, Any]:
    """The used fields of a row: {"messages", "tools" if there are any}, without fields that Arrow filled with null; or
    an example's class and the fields of its template. ValueError for an example that lacks one of these.
    """
    if settings.format == "classification":
        if missing := [name for name in settings.columns if row.get(name) is None]:
            raise ValueError(f"an example has no field {missing[0]!r}, it has {', '.join(map(repr, sorted(row)))}")
        return {name: row[name] for name in settings.columns}
    chat: dict[str, Any] = {"messages": row[settings.column_name]}
    if settings.tools_column and row.get(settings.tools_column):
        chat["tools"] = row[settings.tools_column]
    return {name: _without_nulls(value) for name, value in chat.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k == "content"}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def no_column(place: str, name: str, present: list[str]) -> str:
    """The error message for a missing field."""
    return f"{place}: no field {name!r}, it has {', '.join(map(repr, sorted(present)))}; set `column` to one of them"
