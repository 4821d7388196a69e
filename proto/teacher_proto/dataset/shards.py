"""Shards: Parquet files of targets, encoded in memory and read one row group at a time. Called by `dataset.py`.

The columns are those of `store/parquet.py`; a codec may move some into additional columns (`codecs.py`). The footer has
the format, the teacher, `dataset` (the manifest's digest), the codec and its state. `stillhouse-teacher pack import`
can read a lossless shard. All rows of a document are in one row group.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_proto.dataset.codecs import Codec, codec_of
from teacher_proto.dataset.index import Shard, ShardNote, document_key
from teacher_proto.dataset.listing import SHARD_PREFIX, SHARD_SUFFIX
from teacher_proto.dataset.manifest import Manifest
from teacher_proto.store.entry import Entry, entry_key, pack_entry, sequence_key
from teacher_proto.store.parquet import FORMAT, ROWS_SHA256, Pair, as_row, schema_of, table_of
from teacher_proto.store.parquet_read import read_row, row_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

GROUP_BYTES = 4 * 2**20  # of records, before encoding: what reading one document in random order has to fetch
DATASET, CODEC, STATE, CODED = "dataset", "codec", "codec_state", "stillhouse targets 1, coded"
_PLAIN = ("ids", "logprobs", "lse", "next_logprob", "log_z", "gather_logprobs", "hidden_scale", "tokens")


def encode_shard(manifest: Manifest, documents: Sequence[Sequence[Pair]]) -> tuple[bytes, Shard]:
    """The bytes of a shard, and its part of an index. `documents`: the entries of each; at least one document."""
    import pyarrow.parquet as pq

    groups = list(_grouped(documents))
    codec = codec_of(manifest)
    codec.learn(pair for document in groups[0] for pair in document)
    digest, written = hashlib.sha256(), io.BytesIO()
    schema = _schema(manifest, codec)
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 9, "write_page_checksum": True}
    options |= {"use_dictionary": ["fingerprint", "kind", "hidden_dtype", "gathered"]}
    splits = [f"{name}.list.element" for name in _PLAIN]
    with pq.ParquetWriter(written, schema, use_byte_stream_split=splits, **options) as writer:
        for group in groups:
            pairs = [pair for document in group for pair in document]
            for pair in pairs:
                digest.update(pack_entry(*pair))
            rows = [codec.encode(as_row(*pair), *pair) for pair in pairs]
            writer.write_table(table_of(rows, schema), row_group_size=len(rows))
        writer.add_key_value_metadata(
            {ROWS_SHA256: digest.hexdigest(), STATE: base64.b64encode(codec.state()).decode()}
        )
    data = written.getvalue()
    note = _note(data, _name(manifest, documents), codec.errors())
    return data, (note, *_keys([[pair[0] for document in group for pair in document] for group in groups]))


def note_shard(data: bytes, name: str) -> tuple[ShardNote, np.ndarray, np.ndarray]:
    """The index's part for an existing shard."""
    group_entries: list[list[Entry]] = []
    with open_shard(io.BytesIO(data), name) as file:
        for number in range(file.metadata.num_row_groups):
            table = file.read_row_group(number, columns=["fingerprint", "kind", "tokens"], use_threads=False)
            group_entries.append(
                [
                    Entry(fingerprint=owner, tokens_T=np.array(tokens), kind=kind, start=0, stop=len(tokens))
                    for owner, kind, tokens in zip(*(table.column(i).to_pylist() for i in range(3)), strict=True)
                ]
            )
    return (_note(data, name, None), *_keys(group_entries))


def open_shard(source: Any, place: str, footer: bytes | None = None) -> pq.ParquetFile:
    """Open a shard, with a footer that was read before or its own. ValueError if it is no complete file of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # pyarrow finds the footer from the file's end; the offsets in it are from the beginning of the shard.
        metadata = None if footer is None else pq.read_metadata(io.BytesIO(b"PAR1" + footer))
        file = pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{place} is not an intact Parquet file ({error}): it is truncated or has changed; remove it and its index "
            "file, and run `stillhouse-teacher fill` again"
        ) from None
    if (file.schema_arrow.metadata or {}).get(b"format", b"").decode() not in (FORMAT, CODED):
        raise ValueError(f"{place} does not contain a teacher's targets: it is not a shard of a target dataset")
    return file


class Rows:
    """The rows of one row group, looked up by document; a record is decoded when it is requested.

    ValueError, with `place`, if they belong to a dataset other than that of `manifest`.
    """

    def __init__(self, file: pq.ParquetFile, group: int, manifest: Manifest, place: str):
        import pyarrow as pa

        check_owner(file, manifest, place)
        try:
            table = file.read_row_group(group, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{place}, row group {group}, is truncated or has changed ({error}): `stillhouse-teacher dataset "
                "check` checks all of them"
            ) from None
        self.nbytes = table.nbytes
        self._batch: pa.RecordBatch = table.combine_chunks().to_batches(max_chunksize=max(table.num_rows, 1))[0]
        self._manifest, self._place = manifest, place
        self._codec = codec_of(manifest)
        self._codec.restore_state(base64.b64decode((file.metadata.metadata or {}).get(STATE.encode(), b"")))
        self._rows: dict[bytes, list[int]] = {}
        owners, tokens = self._batch.column("fingerprint"), self._batch.column("tokens")
        for number in range(self._batch.num_rows):
            key = sequence_key(owners[number].as_py(), tokens[number].values.to_numpy(zero_copy_only=False))
            self._rows.setdefault(key, []).append(number)

    def of(self, fingerprint: str, tokens_T: np.ndarray) -> Iterator[Pair]:
        """The entries of one document."""
        for number in self._rows.get(sequence_key(fingerprint, tokens_T), ()):
            yield self._pair(number)

    def all(self) -> Iterator[Pair]:
        for number in range(self._batch.num_rows):
            yield self._pair(number)

    def _pair(self, number: int) -> Pair:
        teacher = self._manifest.teacher
        row = row_of(self._batch, number)
        pair = read_row(self._codec.decode(row), {teacher.fingerprint: teacher})
        if pair is None or pair[0].fingerprint != teacher.fingerprint:
            raise ValueError(f"{self._place} contains a row without valid targets of teacher {teacher.fingerprint}")
        return pair


def check_owner(file: pq.ParquetFile, manifest: Manifest, place: str) -> None:
    """ValueError if a shard was written for another manifest."""
    told = (file.schema_arrow.metadata or {}).get(DATASET.encode(), b"").decode()
    if told != manifest.digest:
        teachers = json.loads((file.schema_arrow.metadata or {}).get(b"teachers", b"[]"))
        whose = ", ".join(str(one.get("fingerprint")) for one in teachers) or "unknown"
        raise ValueError(
            f"{place} was written for dataset {told or 'unknown'} (teacher {whose}), but this folder's manifest is "
            f"{manifest.digest} (teacher {manifest.teacher.fingerprint}): it was put into another dataset's folder"
        )


def rows_sha256(file: pq.ParquetFile) -> str:
    return (file.metadata.metadata or {}).get(ROWS_SHA256.encode(), b"").decode()


def _schema(manifest: Manifest, codec: Codec) -> pa.Schema:
    import pyarrow as pa

    schema = schema_of([manifest.teacher])
    for name, kind in codec.columns.items():
        schema = schema.append(pa.field(name, pa.type_for_alias(kind)))
    metadata = {**(schema.metadata or {}), b"dataset": manifest.digest.encode()}
    metadata[b"format"] = (CODED if codec.columns else FORMAT).encode()
    metadata[b"codec"] = json.dumps(dict(manifest.codec)).encode()
    return schema.with_metadata(metadata)


def _grouped(documents: Sequence[Sequence[Pair]]) -> Iterator[list[Sequence[Pair]]]:
    group: list[Sequence[Pair]] = []
    size = 0
    for document in documents:
        group.append(document)
        size += sum(targets.nbytes + entry.tokens_T.nbytes // 2 for entry, targets in document)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _name(manifest: Manifest, documents: Sequence[Sequence[Pair]]) -> str:
    """A name from the entries' keys: the same entries in the same order have the same name, whoever writes them."""
    digest = hashlib.sha256(manifest.digest.encode())
    for document in documents:
        for entry, _ in document:
            digest.update(entry_key(entry))
    return f"{SHARD_PREFIX}{digest.hexdigest()[:24]}{SHARD_SUFFIX}"


def _note(data: bytes, name: str, errors: dict[str, float] | None) -> ShardNote:
    with open_shard(io.BytesIO(data), name) as file:
        metadata = file.metadata
        groups = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            chunks = [group.column(i) for i in range(group.num_columns)]
            begin = min(chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
            groups.append((begin, sum(chunk.total_compressed_size for chunk in chunks), group.num_rows))
        starts = [
            file.read_row_group(n, columns=["start", "stop", "tokens"], use_threads=False) for n in range(len(groups))
        ]
    rows = sum(int(np.sum(t.column(1).to_numpy()) - np.sum(t.column(0).to_numpy())) for t in starts)
    tokens = sum(len(chunk.flatten()) for t in starts for chunk in t.column(2).chunks)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return ShardNote(
        name,
        len(data),
        hashlib.sha256(data).hexdigest(),
        footer,
        metadata.num_rows,
        rows,
        tokens,
        np.array(groups, np.int64),
        errors,
    )


def _keys(groups: Sequence[Sequence[Entry]]) -> tuple[np.ndarray, np.ndarray]:
    """The key of each document, once, and the number of its row group."""
    found = {
        document_key(sequence_key(entry.fingerprint, entry.tokens_T)): number
        for number, group in enumerate(groups)
        for entry in group
    }
    return np.array(list(found), dtype=np.uint64), np.array(list(found.values()), dtype=np.int64)
