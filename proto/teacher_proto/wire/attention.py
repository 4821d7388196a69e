"""Encodes and decodes attention records as msgpack messages. Used by the attention service, its client and tests.

The stream of messages and its checks are in `responses.py`; WIRE.md is the specification.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import msgpack

from teacher_proto.attention import ATTENTION_KINDS, AttentionKind
from teacher_proto.attention_targets import ATTENTION_TENSORS, AttentionTargets
from teacher_proto.errors import WireError
from teacher_proto.wire.responses import (
    VERSION,
    ResponseFormat,
    integer,
    read_names,
    read_tensors,
    record_message,
)
from teacher_proto.wire.tensors import encode_tensor


@dataclass(frozen=True)
class AttentionHeader:
    """First message of a response of `POST /v1/attention`. `layer`: the requested one, counted from 0."""

    request_id: str
    fingerprint: str
    num_sequences: int
    num_layers: int
    layer: int
    kind: AttentionKind
    version: int = VERSION


def encode_attention_header(header: AttentionHeader) -> bytes:
    return msgpack.packb({"type": "header", **asdict(header)})


def encode_attention(index: int, targets: AttentionTargets, sequence_crc: int | None = None) -> bytes:
    """An `attention` message; its checksum is the CRC-32 of the tensors' data in the order of ATTENTION_TENSORS."""
    tensors = {name: encode_tensor(array) for name, array in targets.tensors().items()}
    return msgpack.packb(record_message("attention", index, {}, tensors, sequence_crc))


def _read_header(message: dict[str, Any]) -> AttentionHeader:
    names = read_names(message)
    kind = message.get("kind")
    if kind not in ATTENTION_KINDS:
        raise WireError(f"the header's kind is {str(kind)[:40]!r}, expected one of {', '.join(ATTENTION_KINDS)}")
    return AttentionHeader(
        **names, num_layers=integer(message, "num_layers"), layer=integer(message, "layer"),
        kind=cast(AttentionKind, kind),
    )  # fmt: skip


def _read_attention(message: dict[str, Any], header: AttentionHeader) -> AttentionTargets:
    return AttentionTargets(header.kind, header.layer, **read_tensors(message, ATTENTION_TENSORS))


ATTENTION_FORMAT = ResponseFormat("attention", _read_header, _read_attention)
