"""Requests to a teacher: a `Query` for one sequence, a `TargetsRequest` for several, and the limits of both.

Clients build them; services decode and check them before they reach the engine. Invalid requests raise a
`RequestError` that names the field at fault.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import BeforeValidator, Field, StrictInt

from teacher_proto.request_checks import (
    SequenceLimits,
    SequencesRequest,
    check_sequences,
    refuse,
    within,
)

Kind = Literal["top_k", "score", "gather", "sampled", "hidden"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# The fields of a `TargetSpec` that each kind reads. What its answer holds is in `targets.TENSORS`.
READS: dict[Kind, tuple[str, ...]] = {
    "top_k": ("top_k", "temperatures"),
    "score": (),
    "gather": ("temperatures",),
    "sampled": ("num_samples", "sample_temperature", "seed"),
    "hidden": ("hidden_dtype",),
}
HiddenDtype = Literal["float16", "bfloat16", "int8"]


def id_matrix(value: Any) -> np.ndarray:
    """Ids to gather, one row per position, as a read-only int64 array [R, G]."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.ndim != 2:
        raise ValueError(f"gather_ids are two-dimensional integer tensors, got {array.dtype} of shape {array.shape}")
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array


def _plain_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {type(value).__name__}")
    return value


GatherIds = Annotated[Any, BeforeValidator(id_matrix)]
Number = Annotated[float, BeforeValidator(_plain_number)]


class Limits(SequenceLimits):
    """What one teacher accepts, published at `GET /v1/teacher`. Lengths in tokens, sizes in bytes."""

    max_top_k: int = 256
    max_temperatures: int = 8
    max_gather: int = 256
    max_samples: int = 4096


@dataclass(frozen=True)
class TargetSpec:
    """What is requested for every sequence of a request; fields that no requested kind reads have neutral values.

    Equal specs over equal tokens and rows have equal targets: engines batch by it, the store uses it as a key.
    """

    kinds: tuple[Kind, ...]
    top_k: int = 0
    temperatures: tuple[float, ...] = ()
    num_samples: int = 0
    sample_temperature: float = 1.0
    seed: int = 0
    hidden_dtype: HiddenDtype | None = None

    @classmethod
    def of(cls, kinds: Collection[Kind], given: object) -> TargetSpec:
        """The spec of these kinds, with the fields that they read taken from `given`."""
        asked = [kind for kind in KINDS if kind in kinds]
        read = {name: getattr(given, name) for kind in asked for name in READS[kind]}
        return cls(kinds=tuple(asked), **read)


@dataclass(frozen=True, eq=False)
class Query:
    """A request to a teacher for one sequence. The trainer makes it, a request carries it, an engine answers it, and a
    store looks it up.

    tokens_T: token ids [T]. rows: the requested positions [start, stop). gather_ids_RG: for kind `gather`, ids [R, G],
    a row for each of those positions; None if they are unknown, as for a record read from a store.
    """

    tokens_T: np.ndarray
    rows: tuple[int, int]
    spec: TargetSpec
    gather_ids_RG: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def gather_width(self) -> int:
        """G, the ids per row of kind `gather`; 0 if it is not requested."""
        if self.gather_ids_RG is None or "gather" not in self.spec.kinds:
            return 0
        return int(self.gather_ids_RG.shape[1])

    @property
    def key(self) -> Hashable:
        """Equal for queries with equal targets: token ids, rows, spec and gathered ids."""
        gathered = b"" if self.gather_ids_RG is None else hashlib.sha256(self.gather_ids_RG.tobytes()).digest()
        return hashlib.sha256(self.tokens_T.tobytes()).digest(), self.rows, self.spec, gathered


class TargetsRequest(SequencesRequest):
    """The body of `POST /v1/targets`: sequences [T], `gather_ids` [R, G] for each; READS lists what each kind reads."""

    per_sequence: ClassVar[tuple[str, ...]] = ("sequences", "rows", "gather_ids")
    tensor_fields: ClassVar[tuple[str, ...]] = ("sequences", "gather_ids")

    kinds: Annotated[tuple[Kind, ...], Field(fail_fast=True)] = ("top_k",)
    top_k: StrictInt = Field(64, description="kind top_k: K, from 1 to the size of the vocabulary")
    temperatures: Annotated[tuple[Number, ...], Field(fail_fast=True)] = Field(
        (), description="temperatures to return log_z for; 1 needs none"
    )
    rows: Annotated[tuple[tuple[StrictInt, StrictInt], ...], Field(fail_fast=True)] | None = Field(
        None, description="a range [start, stop) for each sequence; all rows if absent"
    )
    gather_ids: Annotated[tuple[GatherIds, ...], Field(fail_fast=True)] | None = Field(
        None, description="kind gather: for each sequence, the ids to score, one list for each requested row"
    )
    num_samples: StrictInt = Field(50, description="kind sampled: draws per row, 1 or more")
    sample_temperature: Number = 1.0
    seed: StrictInt = 0
    hidden_dtype: HiddenDtype = "float16"

    @classmethod
    def of(cls, queries: Iterable[Query]) -> TargetsRequest:
        """The request for these queries, in this order: at least one, all with the same spec."""
        queries = tuple(queries)
        spec = queries[0].spec
        assert all(query.spec == spec for query in queries), "all queries of a request have the same spec"
        return cls(
            sequences=tuple(query.tokens_T for query in queries),
            kinds=spec.kinds,
            top_k=spec.top_k,
            temperatures=spec.temperatures,
            rows=tuple(query.rows for query in queries),
            gather_ids=tuple(query.gather_ids_RG for query in queries) if "gather" in spec.kinds else None,
            num_samples=spec.num_samples,
            sample_temperature=spec.sample_temperature,
            seed=spec.seed,
            hidden_dtype=spec.hidden_dtype or "float16",
        )

    @property
    def spec(self) -> TargetSpec:
        return TargetSpec.of(self.kinds, self)

    def query(self, index: int) -> Query:
        """The query for sequence `index`."""
        gathered = self.gather_ids[index] if self.gather_ids is not None and "gather" in self.kinds else None
        return Query(self.sequences[index], self.row_range(index), self.spec, gathered)

    def queries(self) -> list[Query]:
        """A query for each sequence."""
        return [self.query(index) for index in range(len(self.sequences))]

    def values_per_token(self, hidden_width: int) -> int:
        """Numbers returned per token; `hidden_width` is the width of a hidden state."""
        spec = self.spec
        gathered = max((ids_RG.shape[1] for ids_RG in self.gather_ids or ()), default=0)
        return (
            spec.top_k + spec.num_samples + len(spec.temperatures) + (gathered if "gather" in spec.kinds else 0)
            + (hidden_width if "hidden" in spec.kinds else 0)
        )  # fmt: skip

    def cost(self, hidden_width: int) -> int:
        """The cost by which a teacher admits this request: tokens x (values per token + 1)."""
        return self.num_tokens * (self.values_per_token(hidden_width) + 1)

    @property
    def total_rows(self) -> int:
        """The number of requested rows of all sequences."""
        return sum(stop - start for start, stop in map(self.row_range, range(len(self.sequences))))

    def row_range(self, index: int) -> tuple[int, int]:
        """The requested rows [start, stop) of sequence `index`."""
        return self.rows[index] if self.rows is not None else (0, len(self.sequences[index]))


def check_request(request: TargetsRequest, limits: Limits, kinds: tuple[Kind, ...] = KINDS) -> None:
    """Check a request against a teacher's limits. OutOfRangeError with the field, its value and the limit."""
    if not request.kinds or len(set(request.kinds)) != len(request.kinds):
        refuse("kinds", list(request.kinds), list(kinds), "one or more different kinds")
    for kind in request.kinds:
        if kind not in kinds:
            refuse("kinds", kind, list(kinds), "a kind that this teacher serves")
    within("sequences", len(request.sequences), 1, limits.max_sequences, "sequences in a request")
    check_sequences(request, limits)
    # Fields that no requested kind reads must still be within their limits.
    if "top_k" in request.kinds:
        within("top_k", request.top_k, 1, min(limits.max_top_k, limits.vocab_size), "top_k")
    else:
        within("top_k", request.top_k, 0, limits.max_top_k, "top_k")
    within("temperatures", len(request.temperatures), 0, limits.max_temperatures, "temperatures in a request")
    named = [(f"temperatures.{i}", temperature) for i, temperature in enumerate(request.temperatures)]
    for field, temperature in (*named, ("sample_temperature", request.sample_temperature)):
        if not (math.isfinite(temperature) and 1e-3 <= temperature <= 1e3):
            refuse(field, temperature, [1e-3, 1e3], "a finite temperature between 0.001 and 1000")
    _check_rows(request)
    if "gather" in request.kinds:
        _check_gather(request, limits)
    elif request.gather_ids is not None:
        refuse("gather_ids", len(request.gather_ids), None, "none, unless gather is one of the kinds")
    within("num_samples", request.num_samples, int("sampled" in request.kinds), limits.max_samples, "num_samples")
    within("seed", request.seed, 0, 2**63 - 1, "seed")


def _check_rows(request: TargetsRequest) -> None:
    if request.rows is None:
        return
    if len(request.rows) != len(request.sequences):
        refuse("rows", len(request.rows), len(request.sequences), "one [start, stop] per sequence")
    for i, ((start, stop), tokens_T) in enumerate(zip(request.rows, request.sequences, strict=True)):
        if not 0 <= start < stop <= len(tokens_T):
            refuse(f"rows.{i}", [start, stop], len(tokens_T), f"0 <= start < stop <= {len(tokens_T)}")


def _check_gather(request: TargetsRequest, limits: Limits) -> None:
    if request.gather_ids is None or len(request.gather_ids) != len(request.sequences):
        got = None if request.gather_ids is None else len(request.gather_ids)
        refuse("gather_ids", got, len(request.sequences), "one id matrix per sequence for kind gather")
    for i, ids_RG in enumerate(request.gather_ids or ()):
        field = f"gather_ids.{i}"
        start, stop = request.row_range(i)
        if ids_RG.shape[0] != stop - start:
            refuse(field, ids_RG.shape[0], stop - start, "one row of ids for each requested row")
        within(field, ids_RG.shape[1], 1, limits.max_gather, "ids per row")
        if ids_RG.min() < 0 or ids_RG.max() >= limits.vocab_size:
            bad = int(ids_RG.min() if ids_RG.min() < 0 else ids_RG.max())
            refuse(field, bad, limits.vocab_size - 1, f"token ids from 0 to {limits.vocab_size - 1}")
