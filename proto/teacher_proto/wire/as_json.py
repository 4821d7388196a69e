"""The wire format as JSON, for curl and for people: numbers as nested lists, NaN as null, no checksums.

Services call it for `application/json`; WIRE.md describes both forms side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, Protocol

import numpy as np

from teacher_proto.errors import StillhouseError, TruncatedError, WireError
from teacher_proto.request_checks import SequenceLimits
from teacher_proto.targets import TokenTargets

_CONTAINERS = 1024
PIECE_VALUES = 4096


class AnyRecord(Protocol):
    """A record of any route."""

    def tensors(self) -> dict[str, np.ndarray]: ...


def decode_json_request(body: bytes, limits: SequenceLimits) -> dict[str, Any]:
    """The plain fields of a JSON request body. WireError if it is not a JSON object, is too large, has a duplicate key,
    or contains NaN or infinity."""
    if len(body) > limits.max_json_bytes:
        raise WireError(f"got {len(body)} bytes of JSON, expected at most {limits.max_json_bytes}: send msgpack")
    # An empty list takes 2 bytes of JSON and 64 in memory, so count brackets first. Gathered ids take a list per row.
    allowed = _CONTAINERS + 8 * limits.max_sequences + limits.max_request_tokens
    if (brackets := body.count(b"[") + body.count(b"{")) > allowed:
        raise WireError(f"got {brackets} lists and objects, expected at most {allowed}")
    try:
        text = body.decode(json.detect_encoding(body))  # `json.loads` would let surrogates pass
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\u" in text:
            # A lone surrogate could be neither logged nor tokenised: encoding it fails here.
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise WireError(f"the body is a JSON {type(fields).__name__}, expected an object")
    return fields


def json_document(header: dict[str, Any], answers: Mapping[int, AnyRecord | StillhouseError]) -> bytes:
    """A whole response as one JSON object: the header's fields, and `sequences` in the order of the request.

    A failed sequence has `index` and `error`. TruncatedError if a sequence is missing.
    """
    count = header["num_sequences"]
    missing = [i for i in range(count) if i not in answers]
    if missing:
        raise TruncatedError(f"sequences {missing[:8]} of {count} have no result")
    text = [json.dumps(header, allow_nan=False)[:-1], ', "sequences": [']
    for i in range(count):
        text.append(", {" if i else "{")
        for number, (name, value) in enumerate(sequence_fields(i, answers[i]).items()):
            text.append(f'{", " if number else ""}"{name}": ')
            text += array_pieces(value) if isinstance(value, np.ndarray) else [json.dumps(value, allow_nan=False)]
        text.append("}")
    return "".join([*text, "]}"]).encode()


def array_pieces(array: np.ndarray) -> Iterator[str]:
    """The JSON of an array in pieces of some thousand numbers: `json.dumps` lets no other thread run until it is done,
    and takes a second for a million numbers."""
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


def sequence_fields(index: int, answer: AnyRecord | StillhouseError) -> dict[str, Any]:
    """The fields of one sequence: `index`, for targets `start`, and the tensors as arrays; or `index` and `error`."""
    if isinstance(answer, StillhouseError):
        return {"index": index, "error": answer.to_json()}
    start = {"start": answer.start} if isinstance(answer, TokenTargets) else {}
    return {"index": index} | start | answer.tensors()


def json_values(array: np.ndarray) -> list[Any]:
    """An array as nested lists; NaN and infinity, which JSON lacks, become null."""
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
    raise WireError(f"{name} is not JSON, expected a finite number")
