"""Entries of the target store, one per kind: their description, their bytes, and which queries they cover.

An entry is looked up by (fingerprint, token ids), and covers any query for a subset of it: fewer rows, a smaller K,
some of its temperatures; `top_k` also covers `score`. Used by `target_store.py`, `parquet.py` and target datasets.

The bytes of an entry: CRC-32 of all that follows (4 bytes, little-endian), length of the description (4 bytes), the
description as a msgpack map, the record as a `targets` message of WIRE.md.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import msgpack
import numpy as np

from teacher_proto.errors import ChecksumError, WireError
from teacher_proto.requests import KINDS, HiddenDtype, Kind, Query, TargetSpec
from teacher_proto.targets import TENSORS, TokenTargets, tensors_of
from teacher_proto.wire.reader import Budget, read_message
from teacher_proto.wire.records import decode_targets, encode_targets
from teacher_proto.wire.tensors import decode_tensor, encode_tensor

_HEAD = struct.Struct("<II")
_BUDGET = Budget(containers=8, items=64)


@dataclass(frozen=True, eq=False)
class Entry:
    """The description of one stored or requested kind; fields that the kind does not read have neutral values.

    `gathered` is the sha256 of the gathered ids. `wide_ids`: whether ids take three bytes instead of two.
    """

    fingerprint: str
    tokens_T: np.ndarray
    kind: Kind
    start: int
    stop: int
    top_k: int = 0
    temperatures: tuple[float, ...] = ()
    num_samples: int = 0
    sample_temperature: float = 1.0
    seed: int = 0
    hidden_dtype: HiddenDtype | None = None
    gathered: str = ""
    wide_ids: bool = False

    @property
    def query(self) -> Query:
        """The query that this entry answers. Its gathered ids are None, since they are not stored."""
        spec = TargetSpec(
            kinds=(self.kind,), top_k=self.top_k, temperatures=self.temperatures, num_samples=self.num_samples,
            sample_temperature=self.sample_temperature, seed=self.seed, hidden_dtype=self.hidden_dtype,
        )  # fmt: skip
        return Query(self.tokens_T, (self.start, self.stop), spec)

    def covers(self, asked: Entry) -> bool:
        """Whether this stored entry holds all that `asked` requests, given the same sequence and teacher."""
        if self.kind != asked.kind and (self.kind, asked.kind) != ("top_k", "score"):
            return False
        if not self.start <= asked.start < asked.stop <= self.stop:
            return False
        if asked.kind == "gather" and (self.start, self.stop) != (asked.start, asked.stop):
            return False
        return (
            self.top_k >= asked.top_k
            and set(asked.temperatures) <= set(self.temperatures)
            and (asked.kind == "score" or self._drawn() == asked._drawn())
        )

    def _drawn(self) -> tuple[object, ...]:
        """The fields that must be equal, as opposed to at least as large."""
        return self.num_samples, self.sample_temperature, self.seed, self.hidden_dtype, self.gathered


def sequence_key(fingerprint: str, tokens_T: np.ndarray) -> bytes:
    """sha256 of fingerprint and token ids: the common prefix of the keys of all entries of a sequence."""
    return hashlib.sha256(fingerprint.encode() + b"\0" + np.ascontiguousarray(tokens_T, dtype="<i8").tobytes()).digest()


def entry_key(entry: Entry) -> bytes:
    """The key of an entry: that of its sequence, the number of its kind, and a digest of the other fields."""
    rest = [getattr(entry, field.name) for field in fields(Entry) if field.name not in ("fingerprint", "tokens_T")]
    digest = hashlib.sha256(repr(rest).encode()).digest()[:8]
    return sequence_key(entry.fingerprint, entry.tokens_T) + bytes([KINDS.index(entry.kind)]) + digest


def requested_entries(fingerprint: str, query: Query) -> list[Entry]:
    """The entries that answer a query, one per kind; no `score` if there is `top_k`, which contains it."""
    spec = query.spec
    kinds = [kind for kind in KINDS if kind in spec.kinds and not (kind == "score" and "top_k" in spec.kinds)]
    return [_requested_entry(fingerprint, query, kind) for kind in kinds]


def _requested_entry(fingerprint: str, query: Query, kind: Kind) -> Entry:
    gathered = ""
    if kind == "gather":
        assert query.gather_ids_RG is not None, "kind gather needs its ids"
        ids = np.ascontiguousarray(query.gather_ids_RG, dtype="<i8")
        gathered = hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()
    spec = TargetSpec.of((kind,), query.spec)
    return Entry(
        fingerprint=fingerprint, tokens_T=query.tokens_T, kind=kind, start=query.rows[0], stop=query.rows[1],
        top_k=spec.top_k, temperatures=tuple(float(t) for t in spec.temperatures), num_samples=spec.num_samples,
        sample_temperature=spec.sample_temperature, seed=spec.seed, hidden_dtype=spec.hidden_dtype, gathered=gathered,
    )  # fmt: skip


def split(fingerprint: str, query: Query, targets: TokenTargets) -> list[tuple[Entry, TokenTargets]]:
    """The targets of a query, split into the entries to store."""
    parts = []
    for entry in requested_entries(fingerprint, query):
        part = only(targets, tensors_of((entry.kind,)))
        wide = any(array.dtype.itemsize > 2 for name, array in part.tensors().items() if name in _ID_TENSORS)
        parts.append((replace(entry, wide_ids=wide), part))
    return parts


def join(parts: Sequence[TokenTargets]) -> TokenTargets:
    """Several kinds' parts as one record; a tensor that two of them have is taken from the first."""
    tensors: dict[str, np.ndarray] = {}
    for part in parts:
        tensors = part.tensors() | tensors
    return TokenTargets(start=parts[0].start, **tensors)


def cut(targets: TokenTargets, stored: Entry, asked: Entry) -> TokenTargets:
    """What `asked` requests, as views of the record of an entry that covers it."""
    part = only(targets, tensors_of((asked.kind,))).narrow(asked.start, asked.stop, asked.top_k or None)
    if part.log_z is None or stored.temperatures == asked.temperatures:
        return part
    columns = [stored.temperatures.index(temperature) for temperature in asked.temperatures]
    return replace(part, log_z=part.log_z[:, columns])


def only(targets: TokenTargets, names: Sequence[str]) -> TokenTargets:
    return TokenTargets(targets.start, **{n: array for n, array in targets.tensors().items() if n in names})


def pack_entry(entry: Entry, targets: TokenTargets) -> bytes:
    """The bytes of an entry."""
    description: dict[str, Any] = {field.name: getattr(entry, field.name) for field in fields(Entry)}
    narrow = entry.tokens_T.size == 0 or int(entry.tokens_T.max()) < 65_536
    description["tokens_T"] = encode_tensor(entry.tokens_T, "<u2" if narrow else "u3")
    head = msgpack.packb(description)
    message = encode_targets(0, targets, _WIDE if entry.wide_ids else _NARROW)
    crc = zlib.crc32(message, zlib.crc32(head, zlib.crc32(struct.pack("<I", len(head)))))
    return b"".join((_HEAD.pack(crc, len(head)), head, message))


def unpack_description(value: memoryview) -> Entry:
    """Only the description of an entry, without checking the CRC. WireError if it is malformed."""
    if len(value) < _HEAD.size:
        raise WireError(f"an entry of {len(value)} bytes is truncated")
    size = _HEAD.unpack_from(value)[1]
    described = read_message(bytes(value[_HEAD.size : _HEAD.size + size]), _BUDGET)
    if not isinstance(described, dict) or set(described) != {field.name for field in fields(Entry)}:
        raise WireError("an entry's description does not have the fields of version 1")
    tokens_T = decode_tensor(described.pop("tokens_T"), "tokens_T", ("<u2", "u3")).astype(np.int64)
    temperatures = described.pop("temperatures")
    whole = isinstance(temperatures, list) and all(isinstance(described[n], kinds) for n, kinds in _TYPES.items())
    if not whole or described["kind"] not in KINDS:
        raise WireError("an entry's description has a field of the wrong type or an unknown kind")
    return Entry(tokens_T=tokens_T, temperatures=tuple(temperatures), **described)


def whole_entry(key: bytes, value: memoryview, asked: Entry | None = None) -> Entry | None:
    """The verified description of the entry at `key`; None if it does not cover `asked`. WireError if damaged."""
    stored = unpack_description(value)
    if asked is not None and not stored.covers(asked):
        return None
    if zlib.crc32(value[4:]) != _HEAD.unpack_from(value)[0]:
        raise ChecksumError("an entry has changed since it was written")
    if entry_key(stored) != key:
        raise WireError("an entry is stored under another entry's key")
    return stored


def unpack_targets(value: memoryview) -> TokenTargets:
    """The record of an entry that `whole_entry` has verified; its arrays are not views of `value`."""
    return decode_targets(bytes(value[_HEAD.size + _HEAD.unpack_from(value)[1] :])).targets


_TYPES: dict[str, tuple[type, ...]] = {
    "fingerprint": (str,), "kind": (str,), "start": (int,), "stop": (int,), "top_k": (int,), "num_samples": (int,),
    "sample_temperature": (int, float), "seed": (int,), "hidden_dtype": (str, type(None)), "gathered": (str,),
    "wide_ids": (bool,),
}  # fmt: skip
_ID_TENSORS = ("ids", "sampled_ids")
# Vocabulary sizes that select ids of two and of three bytes.
_NARROW, _WIDE = 65_536, 2**24
assert {name for name, spec in TENSORS.items() if "u3" in spec.dtypes} == set(_ID_TENSORS)
