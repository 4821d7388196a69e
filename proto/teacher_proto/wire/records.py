"""Records <-> msgpack messages: tensors, checksums, limits. Used by services, client, store and tests alike.

The specification is WIRE.md. The request's half is in `requests.py`, the stream of messages in `answers.py`,
tensors in `tensors.py`, JSON in `as_json.py`; their names are handed on here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgpack

from teacher_proto.errors import WireError
from teacher_proto.targets import TENSORS, TokenTargets, id_dtype
from teacher_proto.wire.answers import (
    BUDGET,
    MAX_MESSAGE_BYTES,
    PROGRESS_HEADER,
    VERSION,
    AnswerDecoder,
    AnswerFormat,
    End,
    Failure,
    Progress,
    Targets,
    encode_end,
    encode_failure,
    encode_progress,
    integer,
    read_names,
    read_tensors,
    record_message,
)
from teacher_proto.wire.reader import read_message
from teacher_proto.wire.requests import decode_request, encode_request
from teacher_proto.wire.tensors import ITEM_SIZE, decode_tensor, encode_tensor

MSGPACK = "application/msgpack"
JSON = "application/json"
REQUEST_ID_HEADER = "x-request-id"

__all__ = [
    "ITEM_SIZE", "JSON", "MSGPACK", "PROGRESS_HEADER", "REQUEST_ID_HEADER", "VERSION",
    "End", "Failure", "Header", "Message", "Progress", "ResponseDecoder", "Targets",
    "decode_request", "decode_targets", "decode_tensor",
    "encode_end", "encode_failure", "encode_header", "encode_progress", "encode_request", "encode_targets",
    "encode_tensor",
    "targets_message",
]  # fmt: skip


@dataclass(frozen=True)
class Header:
    """First message of an answer. `temperatures` are those of `log_z`, in order."""

    request_id: str
    fingerprint: str
    num_sequences: int
    vocab_size: int
    top_k: int
    temperatures: tuple[float, ...]
    version: int = VERSION


Message = Header | Targets[TokenTargets] | Failure | Progress | End


def encode_header(header: Header) -> bytes:
    return msgpack.packb({"type": "header", "version": header.version, "request_id": header.request_id,
                          "fingerprint": header.fingerprint, "num_sequences": header.num_sequences,
                          "vocab_size": header.vocab_size, "top_k": header.top_k,
                          "temperatures": list(header.temperatures)})  # fmt: skip


def targets_message(index: int, targets: TokenTargets, vocab_size: int) -> dict[str, Any]:
    """A `targets` message as a map; its checksum is CRC-32 over the tensors' data in the order of TENSORS."""
    tensors = {}
    for name, array in targets.tensors().items():
        dtype = id_dtype(vocab_size) if name in ("ids", "sampled_ids") else None
        tensors[name] = encode_tensor(array, dtype)
    return record_message("targets", index, {"start": targets.start}, tensors)


def encode_targets(index: int, targets: TokenTargets, vocab_size: int) -> bytes:
    return msgpack.packb(targets_message(index, targets, vocab_size))


def decode_targets(message: bytes) -> Targets[TokenTargets]:
    """One `targets` message by itself; its tensors are views of `message`. WireError if it is none."""
    fields = read_message(message, BUDGET)
    if not isinstance(fields, dict) or fields.get("type") != "targets":
        raise WireError("a targets message was expected")
    return Targets(integer(fields, "index"), _read_targets(fields))


class ResponseDecoder(AnswerDecoder[Header, TokenTargets]):
    """An `AnswerDecoder` of `POST /v1/targets`."""

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES):
        super().__init__(TARGETS_FORMAT, max_message_bytes)


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


TARGETS_FORMAT = AnswerFormat("targets", _read_header, _read_targets)
