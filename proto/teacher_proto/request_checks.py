"""What all requests have in common: token sequences, the expected teacher, limits, and their checks.

Used by `requests.py` and `attention.py`. Invalid requests raise a `RequestError` that names the field at fault.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, NoReturn, Self, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from teacher_proto.errors import MalformedError, OutOfRangeError


def token_array(value: Any) -> np.ndarray:
    """One sequence as a read-only int64 array [T], from a list of ints or an integer array."""
    if not isinstance(value, np.ndarray):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"a sequence is a tensor or a list of token ids, got {type(value).__name__}")
        if any(type(token) is not int for token in value):
            raise ValueError("a sequence contains a token id that is not an integer")
        if any(abs(token) >= 2**63 for token in value):
            raise ValueError("a token id does not fit into 64 bits")
        value = np.array(value, dtype=np.int64)
    if value.dtype.kind not in "iu" or value.ndim != 1:
        raise ValueError(f"a sequence is a one-dimensional integer tensor, got {value.dtype} of shape {value.shape}")
    array = value.astype(np.int64)
    array.flags.writeable = False
    return array


Sequence = Annotated[Any, BeforeValidator(token_array)]


class SequenceLimits(BaseModel):
    """The limits of any request to a service. Lengths in tokens, sizes in bytes. `max_cost` is the highest cost that an
    empty service admits, in tokens x (values per token + 1); None if a service doesn't say."""

    # Unknown limits, of a later service, are ignored.
    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: int
    max_sequence_length: int
    max_sequences: int = 256
    max_request_tokens: int = 131_072
    max_body_bytes: int = 16 * 2**20
    max_json_bytes: int = 2**20
    # On the wire this is beside the limits, since older clients refuse unknown limits.
    max_cost: int | None = Field(None, exclude=True)


class SequencesRequest(BaseModel):
    """Token ids, each [T], and the teacher that must respond; each service's request adds fields for its targets."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    # The fields with one item per sequence, and those of them whose items are arrays.
    per_sequence: ClassVar[tuple[str, ...]] = ("sequences",)
    tensor_fields: ClassVar[tuple[str, ...]] = ("sequences",)

    # Every list of a request fails fast: collecting the errors of a hundred thousand items would take seconds.
    sequences: Annotated[tuple[Sequence, ...], Field(fail_fast=True)] = Field(description="token ids of each sequence")
    fingerprint: str | None = Field(None, description="the teacher that must respond; any if absent")

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens_T) for tokens_T in self.sequences)

    def sequence_bytes(self, index: int) -> int:
        """An upper bound of the bytes that sequence `index` and its other fields take in a msgpack body."""
        fields = [values[index] for name in self.per_sequence if (values := getattr(self, name)) is not None]
        return sum(4 * field.size + 64 if isinstance(field, np.ndarray) else 64 for field in fields)

    def select(self, indexes: Iterable[int]) -> Self:
        """The same request for only these sequences, in this order."""
        indexes = list(indexes)
        given = {name: values for name in self.per_sequence if (values := getattr(self, name)) is not None}
        return self.model_copy(update={name: tuple(values[i] for i in indexes) for name, values in given.items()})


RequestT = TypeVar("RequestT", bound=SequencesRequest)


def parse_body(kind: type[RequestT], body: dict[str, Any]) -> RequestT:
    """A request from a decoded body. MalformedError for an unknown or missing field, OutOfRangeError for a value."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise MalformedError(f"unknown field {field!r}; available: {known}", field=field) from None
        if first["type"] == "missing":
            raise MalformedError(f"field {field!r} is missing", field=field) from None
        got = repr(first["input"])
        got = got if len(got) <= 80 else got[:77] + "..."
        raise OutOfRangeError(f"{field}: {first['msg']} (got {got})", field=field, got=got) from None


def check_sequences(request: SequencesRequest, limits: SequenceLimits) -> None:
    for i, tokens_T in enumerate(request.sequences):
        field = f"sequences.{i}"
        within(field, len(tokens_T), 1, limits.max_sequence_length, "tokens in a sequence")
        low, high = int(tokens_T.min()), int(tokens_T.max())
        if low < 0 or high >= limits.vocab_size:
            bad = low if low < 0 else high
            refuse(field, bad, limits.vocab_size - 1, f"token ids from 0 to {limits.vocab_size - 1}")
    within("sequences", request.num_tokens, 1, limits.max_request_tokens, "tokens in a request")


def within(field: str, got: int, low: int, high: int, what: str) -> None:
    if not low <= got <= high:
        limit = high if got > high else low
        raise OutOfRangeError(f"{field}: {got} {what}, expected {low} to {high}", field=field, got=got, limit=limit)


def refuse(field: str, got: Any, limit: Any, expected: str) -> NoReturn:
    raise OutOfRangeError(f"{field}: got {got}, expected {expected}", field=field, got=got, limit=limit)
