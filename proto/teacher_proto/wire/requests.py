"""The body of `POST /v1/targets` or `/v1/attention`: a request to msgpack, and msgpack of any sender to plain fields.

Handed on by `records.py`. `request_checks.parse_body` makes a request of the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from teacher_proto.errors import WireError
from teacher_proto.request_checks import SequenceLimits, SequencesRequest
from teacher_proto.requests import TargetsRequest
from teacher_proto.wire.reader import Budget, read_message
from teacher_proto.wire.tensors import decode_tensor, encode_tensor

# Four bytes an id and no fewer: 16 MB of bytes would become 128 MB of int64 otherwise.
_WIDE_DTYPES = ("<i4", "<u4")


def encode_request(request: SequencesRequest) -> bytes:
    """The msgpack body of a request: ids as int32 tensors, fields at their defaults left out.

    ValueError where a token id does not fit 31 bits.
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

    Tensors are views of `body`. What the fields hold is for `parse_body` and the checks to judge; only what would take
    memory out of proportion is refused here.
    """
    fields = read_message(body, _budget(limits))
    if not isinstance(fields, dict):
        raise WireError(f"the body is a msgpack {type(fields).__name__}, a map was expected")
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
    """Those items of a list field that are maps, hence meant as tensors."""
    items = fields.get(name)
    if not isinstance(items, list):
        return []
    return [(i, item) for i, item in enumerate(items) if isinstance(item, Mapping)]


def _budget(limits: SequenceLimits) -> Budget:
    """Two containers for a tensor, one for a list or a row range, of each sequence; rows of gathered ids as lists."""
    return Budget(containers=8 * limits.max_sequences + 1024, items=2 * limits.max_request_tokens + 4096)
