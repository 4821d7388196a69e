"""The same wire as JSON, for curl and for people: numbers as nested lists, NaN as null, no checksums.

Services call it for `application/json`; WIRE.md has both forms side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from teacher_proto.errors import StillhouseError, TruncatedError, WireError
from teacher_proto.request_checks import SequenceLimits
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.records import Header

_CONTAINERS = 1024
PIECE_VALUES = 4096


def decode_json_request(body: bytes, limits: SequenceLimits) -> dict[str, Any]:
    """The plain fields of a JSON request body. WireError if it is none, holds a key twice, or NaN and its like."""
    if len(body) > limits.max_json_bytes:
        raise WireError(f"{len(body)} bytes of JSON came, at most {limits.max_json_bytes} are read: send msgpack")
    # Two bytes of an empty list become 64: they are counted before they are made. Gathered ids are a list a row.
    allowed = _CONTAINERS + 8 * limits.max_sequences + limits.max_request_tokens
    if (brackets := body.count(b"[") + body.count(b"{")) > allowed:
        raise WireError(f"{brackets} lists and objects came, at most {allowed} are read")
    try:
        fields = json.loads(body, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if b"\\u" in body:
            # Half a surrogate pair is text that can be neither logged nor sent on.
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise WireError(f"the body is a JSON {type(fields).__name__}, an object was expected")
    return fields


def json_document(header: Header, answers: Mapping[int, TokenTargets | StillhouseError]) -> bytes:
    """A whole answer as one JSON object: the header's fields, and `sequences` in the order asked.

    A sequence that failed has `index` and `error`. TruncatedError where an answer is missing.
    """
    return document(header_fields(header), {i: sequence_fields(i, answer) for i, answer in answers.items()})


def document(header: dict[str, Any], sequences: Mapping[int, dict[str, Any]]) -> bytes:
    """The JSON of a header's fields and each sequence's, which may be arrays. TruncatedError where one of
    `num_sequences` is missing."""
    count = header["num_sequences"]
    missing = [i for i in range(count) if i not in sequences]
    if missing:
        raise TruncatedError(f"sequences {missing[:8]} of {count} have no answer")
    text = [json.dumps(header, allow_nan=False)[:-1], ', "sequences": [']
    for i in range(count):
        text.append(", {" if i else "{")
        for number, (name, value) in enumerate(sequences[i].items()):
            text.append(f'{", " if number else ""}"{name}": ')
            text += array_pieces(value) if isinstance(value, np.ndarray) else [json.dumps(value, allow_nan=False)]
        text.append("}")
    return "".join([*text, "]}"]).encode()


def array_pieces(array: np.ndarray) -> Iterator[str]:
    """The JSON of an array, some thousands of numbers at a time: `json.dumps` lets no other thread run before it is
    through, and a million numbers take it a second."""
    if array.size <= PIECE_VALUES or array.ndim == 0:
        yield json.dumps(json_values(array), allow_nan=False)
        return
    rows = PIECE_VALUES * len(array) // array.size
    for start in range(0, len(array), max(rows, 1)):
        yield ", " if start else "["
        if rows:
            yield json.dumps(json_values(array[start : start + rows]), allow_nan=False)[1:-1]
        else:
            yield from array_pieces(array[start])
    yield "]"


def header_fields(header: Header) -> dict[str, Any]:
    return {
        "version": header.version, "request_id": header.request_id, "fingerprint": header.fingerprint,
        "num_sequences": header.num_sequences, "vocab_size": header.vocab_size, "top_k": header.top_k,
        "temperatures": list(header.temperatures),
    }  # fmt: skip


def sequence_fields(index: int, answer: TokenTargets | StillhouseError) -> dict[str, Any]:
    """One sequence: `index`, `start` and each tensor, or `index` and `error`."""
    if isinstance(answer, StillhouseError):
        return {"index": index, "error": answer.to_json()}
    return {"index": index, "start": answer.start} | answer.tensors()


def json_values(array: np.ndarray) -> list[Any]:
    """Nested lists of an array; NaN and infinity, which JSON has not, become null."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return array.tolist()
    values = array.astype(object)
    values[~np.isfinite(array)] = None
    return values.tolist()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise WireError("an object has the same key twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise WireError(f"{name} is not JSON; a finite number was expected")
