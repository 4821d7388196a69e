"""Encodes and decodes requests and targets as msgpack messages. Used by services, clients, store and tests.

The specification is WIRE.md. The message stream of a response is in `responses.py`, tensors in `tensors.py`, JSON in
`as_json.py`. `request_checks.parse_body` turns the plain fields that `decode_request` returns into a request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from teacher_proto.errors import WireError
from teacher_proto.request_checks import SequenceLimits, SequencesRequest
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TENSORS, TokenTargets, id_dtype
from teacher_proto.wire.reader import Budget, read_message
from teacher_proto.wire.responses import (
    BUDGET,
    VERSION,
    ResponseFormat,
    Targets,
    integer,
    read_names,
    read_tensors,
    record_message,
)
from teacher_proto.wire.tensors import decode_tensor, encode_tensor

MSGPACK = "application/msgpack"
JSON = "application/json"
REQUEST_ID_HEADER = "x-request-id"
# At least four bytes per id: 16 MB of one-byte ids would become 128 MB of int64.
_WIDE_DTYPES = ("<i4", "<u4")


@dataclass(frozen=True)
class Header:
    """First message of a response. `temperatures` are those of `log_z`, in order."""

    request_id: str
    fingerprint: str
    num_sequences: int
    vocab_size: int
    top_k: int
    temperatures: tuple[float, ...]
    version: int = VERSION


def header_fields(header: Header) -> dict[str, Any]:
    return {
        "version": header.version, "request_id": header.request_id, "fingerprint": header.fingerprint,
        "num_sequences": header.num_sequences, "vocab_size": header.vocab_size, "top_k": header.top_k,
        "temperatures": list(header.temperatures),
    }  # fmt: skip


def encode_header(header: Header) -> bytes:
    return msgpack.packb({"type": "header", **header_fields(header)})


def encode_targets(index: int, targets: TokenTargets, vocab_size: int, sequence_crc: int | None = None) -> bytes:
    """A `targets` message; its checksum is the CRC-32 of the tensors' data in the order of TENSORS."""
    tensors = {}
    for name, array in targets.tensors().items():
        dtype = id_dtype(vocab_size) if name in ("ids", "sampled_ids") else None
        tensors[name] = encode_tensor(array, dtype)
    return msgpack.packb(record_message("targets", index, {"start": targets.start}, tensors, sequence_crc))


def decode_targets(message: bytes) -> Targets[TokenTargets]:
    """Decode a single `targets` message; its tensors are views of `message`. WireError if it is none."""
    fields = read_message(message, BUDGET)
    if not isinstance(fields, dict) or fields.get("type") != "targets":
        raise WireError("expected a targets message")
    return Targets(integer(fields, "index"), _read_targets(fields))


def _read_header(message: dict[str, Any]) -> Header:
    names = read_names(message)
    temperatures = message.get("temperatures")
    if not isinstance(temperatures, list):
        raise WireError("the header lacks temperatures")
    if not all(type(t) in (int, float) and math.isfinite(t) for t in temperatures):
        raise WireError("the header's temperatures are not finite numbers")
    return Header(
        **names, vocab_size=integer(message, "vocab_size"), top_k=integer(message, "top_k"),
        temperatures=tuple(float(t) for t in temperatures),
    )  # fmt: skip


def _read_targets(message: dict[str, Any], header: Header | None = None) -> TokenTargets:
    dtypes = {name: spec.dtypes for name, spec in TENSORS.items()}
    return TokenTargets(start=integer(message, "start"), **read_tensors(message, dtypes, ("start",)))


TARGETS_FORMAT = ResponseFormat("targets", _read_header, _read_targets)


def encode_request(request: SequencesRequest) -> bytes:
    """The msgpack body of a request: ids as int32 tensors, fields at their defaults omitted.

    ValueError if a token id does not fit int32.
    """
    body: dict[str, Any] = {}
    for name, field in type(request).model_fields.items():
        value = getattr(request, name)
        if value is None or (name != "sequences" and value == field.default):
            continue
        body[name] = [encode_tensor(ids, "<i4") for ids in value] if name in request.tensor_fields else value
    return msgpack.packb(body)


def decode_request(
    body: bytes, limits: SequenceLimits, kind: type[SequencesRequest] = TargetsRequest
) -> dict[str, Any]:
    """The plain fields of a msgpack request body, its tensors and lists of ids as arrays. WireError if it is none.

    Tensors are views of `body`. `parse_body` and the request checks validate the fields; only what would take a
    disproportionate amount of memory is refused here.
    """
    fields = read_message(body, _budget(limits))
    if not isinstance(fields, dict):
        raise WireError(f"the body is a msgpack {type(fields).__name__}, expected a map")
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = value.tolist()
    left = limits.max_request_tokens * 2
    for i, item in _tensors(fields, "sequences"):
        tokens = decode_tensor(item, f"sequences.{i}")
        fields["sequences"][i] = tokens
        left -= tokens.size
        if left < 0:
            raise WireError(f"the sequences hold more than twice the {limits.max_request_tokens} tokens of a request")
    for name in kind.tensor_fields[1:]:
        for i, item in _tensors(fields, name):
            fields[name][i] = decode_tensor(item, f"{name}.{i}", _WIDE_DTYPES)
    return fields


def _tensors(fields: Mapping[str, Any], name: str) -> list[tuple[int, Any]]:
    """Index and value of the items of a list field that are maps, and so meant to be tensors."""
    items = fields.get(name)
    if not isinstance(items, list):
        return []
    return [(i, item) for i, item in enumerate(items) if isinstance(item, Mapping)]


def _budget(limits: SequenceLimits) -> Budget:
    """Containers for each sequence: two per tensor, one per list or row range, and some for rows of gathered ids."""
    return Budget(containers=8 * limits.max_sequences + 1024, items=2 * limits.max_request_tokens + 4096)
