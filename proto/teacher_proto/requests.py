"""What a client asks, and the limits that it must keep to.

Built by clients, decoded and checked by services before the engine hears of it. Nothing here raises anything
but a `RequestError` with the field at fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictInt, ValidationError

from teacher_proto.errors import MalformedError, OutOfRangeError

Kind = Literal["top_k", "score", "gather", "sampled", "hidden"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HiddenDtype = Literal["float16", "bfloat16", "int8"]


def token_array(value: Any) -> np.ndarray:
    """One sequence as a read-only int64 array [T], from a list of ints or an integer array."""
    if not isinstance(value, np.ndarray):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"a sequence is a tensor or a list of token ids, got {type(value).__name__}")
        if any(type(token) is not int for token in value):
            raise ValueError("a sequence holds token ids, and one of these is not an integer")
        if any(abs(token) >= 2**63 for token in value):
            raise ValueError("a token id does not fit 64 bits")
        value = np.array(value, dtype=np.int64)
    if value.dtype.kind not in "iu" or value.ndim != 1:
        raise ValueError(f"a sequence is a one-dimensional integer tensor, got {value.dtype} of shape {value.shape}")
    array = value.astype(np.int64)
    array.flags.writeable = False
    return array


def id_matrix(value: Any) -> np.ndarray:
    """Ids to gather, one row a position, as a read-only int64 array [R, G]."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.ndim != 2:
        raise ValueError(f"gather_ids are two-dimensional integer tensors, got {array.dtype} of shape {array.shape}")
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array


def _plain_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a number is expected, got {type(value).__name__}")
    return value


Sequence = Annotated[Any, BeforeValidator(token_array)]
GatherIds = Annotated[Any, BeforeValidator(id_matrix)]
Number = Annotated[float, BeforeValidator(_plain_number)]


class Limits(BaseModel):
    """What one teacher accepts, published at `GET /v1/teacher`. Lengths in tokens, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int
    max_sequence_length: int
    max_sequences: int = 256
    max_request_tokens: int = 131_072
    max_top_k: int = 256
    max_temperatures: int = 8
    max_gather: int = 256
    max_samples: int = 4096
    max_body_bytes: int = 16 * 2**20
    max_json_bytes: int = 2**20


@dataclass(frozen=True)
class TargetSpec:
    """What is asked of every sequence alike, with fields that no asked kind reads at their neutral value.

    Two equal specs over equal tokens and rows have equal answers: engines batch by it, the store keys by it.
    """

    kinds: tuple[Kind, ...]
    top_k: int = 0
    temperatures: tuple[float, ...] = ()
    num_samples: int = 0
    sample_temperature: float = 1.0
    seed: int = 0
    hidden_dtype: HiddenDtype | None = None


class TargetsRequest(BaseModel):
    """The body of `POST /v1/targets`.

    `sequences`: token ids, each [T]. `rows`: a [start, stop) a sequence, all rows where absent.
    `gather_ids`: for kind `gather`, an id matrix [R, G] a sequence. `num_samples`, `sample_temperature`, `seed`:
    for kind `sampled`. `fingerprint`: the teacher that must answer, anyone where absent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    sequences: tuple[Sequence, ...]
    kinds: tuple[Kind, ...] = ("top_k",)
    top_k: StrictInt = 64
    temperatures: tuple[Number, ...] = ()
    fingerprint: str | None = None
    rows: tuple[tuple[StrictInt, StrictInt], ...] | None = None
    gather_ids: tuple[GatherIds, ...] | None = None
    num_samples: StrictInt = 50
    sample_temperature: Number = 1.0
    seed: StrictInt = 0
    hidden_dtype: HiddenDtype = "float16"

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens_T) for tokens_T in self.sequences)

    @property
    def spec(self) -> TargetSpec:
        kinds = tuple(kind for kind in KINDS if kind in self.kinds)
        sampled = "sampled" in kinds
        return TargetSpec(
            kinds=kinds,
            top_k=self.top_k if "top_k" in kinds else 0,
            temperatures=self.temperatures if {"top_k", "gather"} & set(kinds) else (),
            num_samples=self.num_samples if sampled else 0,
            sample_temperature=self.sample_temperature if sampled else 1.0,
            seed=self.seed if sampled else 0,
            hidden_dtype=self.hidden_dtype if "hidden" in kinds else None,
        )

    def row_range(self, index: int) -> tuple[int, int]:
        """The rows [start, stop) that are asked of sequence `index`."""
        return self.rows[index] if self.rows is not None else (0, len(self.sequences[index]))

    def select(self, indexes: Iterable[int]) -> TargetsRequest:
        """The same request of these sequences alone, in this order."""
        indexes = list(indexes)
        cut: dict[str, Any] = {"sequences": tuple(self.sequences[i] for i in indexes)}
        if self.rows is not None:
            cut["rows"] = tuple(self.rows[i] for i in indexes)
        if self.gather_ids is not None:
            cut["gather_ids"] = tuple(self.gather_ids[i] for i in indexes)
        return self.model_copy(update=cut)


def parse_request(body: dict[str, Any]) -> TargetsRequest:
    """A request out of a decoded body. MalformedError for an unknown or missing field, OutOfRangeError for a value."""
    try:
        return TargetsRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(TargetsRequest.model_fields)
            raise MalformedError(f"unknown field {field!r}; known are {known}", field=field) from None
        if first["type"] == "missing":
            raise MalformedError(f"field {field!r} is missing", field=field) from None
        got = repr(first["input"])
        got = got if len(got) <= 80 else got[:77] + "..."
        raise OutOfRangeError(f"{field}: {first['msg']} (got {got})", field=field, got=got) from None


def check_request(request: TargetsRequest, limits: Limits, kinds: tuple[Kind, ...] = KINDS) -> None:
    """Hold a request to a teacher's limits. OutOfRangeError names the field, what came and the limit."""
    if not request.kinds or len(set(request.kinds)) != len(request.kinds):
        _refuse("kinds", list(request.kinds), list(kinds), "one or more different kinds")
    for kind in request.kinds:
        if kind not in kinds:
            _refuse("kinds", kind, list(kinds), "a kind that this teacher serves")
    _within("sequences", len(request.sequences), 1, limits.max_sequences, "sequences in a request")
    _check_sequences(request, limits)
    if "top_k" in request.kinds:
        _within("top_k", request.top_k, 1, min(limits.max_top_k, limits.vocab_size), "top_k")
    _within("temperatures", len(request.temperatures), 0, limits.max_temperatures, "temperatures in a request")
    named = [(f"temperatures.{i}", temperature) for i, temperature in enumerate(request.temperatures)]
    for field, temperature in (*named, ("sample_temperature", request.sample_temperature)):
        if not (math.isfinite(temperature) and 1e-3 <= temperature <= 1e3):
            _refuse(field, temperature, [1e-3, 1e3], "a finite temperature within 0.001 and 1000")
    _check_rows(request)
    if "gather" in request.kinds:
        _check_gather(request, limits)
    elif request.gather_ids is not None:
        _refuse("gather_ids", len(request.gather_ids), None, "none, unless gather is one of the kinds")
    if "sampled" in request.kinds:
        _within("num_samples", request.num_samples, 1, limits.max_samples, "num_samples")
        _within("seed", request.seed, 0, 2**63 - 1, "seed")


def _check_sequences(request: TargetsRequest, limits: Limits) -> None:
    for i, tokens_T in enumerate(request.sequences):
        field = f"sequences.{i}"
        _within(field, len(tokens_T), 1, limits.max_sequence_length, "tokens in a sequence")
        low, high = int(tokens_T.min()), int(tokens_T.max())
        if low < 0 or high >= limits.vocab_size:
            bad = low if low < 0 else high
            _refuse(field, bad, limits.vocab_size - 1, f"token ids from 0 to {limits.vocab_size - 1}")
    _within("sequences", request.num_tokens, 1, limits.max_request_tokens, "tokens in a request")


def _check_rows(request: TargetsRequest) -> None:
    if request.rows is None:
        return
    if len(request.rows) != len(request.sequences):
        _refuse("rows", len(request.rows), len(request.sequences), "one [start, stop] a sequence")
    for i, ((start, stop), tokens_T) in enumerate(zip(request.rows, request.sequences, strict=True)):
        if not 0 <= start < stop <= len(tokens_T):
            _refuse(f"rows.{i}", [start, stop], len(tokens_T), f"0 <= start < stop <= {len(tokens_T)}")


def _check_gather(request: TargetsRequest, limits: Limits) -> None:
    if request.gather_ids is None or len(request.gather_ids) != len(request.sequences):
        got = None if request.gather_ids is None else len(request.gather_ids)
        _refuse("gather_ids", got, len(request.sequences), "one id matrix a sequence for kind gather")
    for i, ids_RG in enumerate(request.gather_ids or ()):
        field = f"gather_ids.{i}"
        start, stop = request.row_range(i)
        if ids_RG.shape[0] != stop - start:
            _refuse(field, ids_RG.shape[0], stop - start, "one row of ids for each row asked for")
        _within(field, ids_RG.shape[1], 1, limits.max_gather, "ids a row")
        if ids_RG.min() < 0 or ids_RG.max() >= limits.vocab_size:
            bad = int(ids_RG.min() if ids_RG.min() < 0 else ids_RG.max())
            _refuse(field, bad, limits.vocab_size - 1, f"token ids from 0 to {limits.vocab_size - 1}")


def _within(field: str, got: int, low: int, high: int, what: str) -> None:
    if not low <= got <= high:
        limit = high if got > high else low
        raise OutOfRangeError(f"{field}: {got} {what}, expected {low} to {high}", field=field, got=got, limit=limit)


def _refuse(field: str, got: Any, limit: Any, expected: str) -> None:
    raise OutOfRangeError(f"{field}: got {got}, expected {expected}", field=field, got=got, limit=limit)
