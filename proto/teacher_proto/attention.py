"""The attention service's requests, its description of itself, and its limits. Used by the service, client and trainer.

A sequence is one document: attention and relations never look beyond it. The returned records are in
`attention_targets.py`, the definitions of relations in `relations.py`. Invalid requests raise a `RequestError` that
names the field at fault.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

from teacher_proto.compute.relations import FORMS, LAYER_NAMES, RelationForm, layer_index
from teacher_proto.errors import NotFoundError
from teacher_proto.info import ServiceInfo
from teacher_proto.request_checks import (
    SequenceLimits,
    SequencesRequest,
    check_sequences,
    refuse,
    token_array,
    within,
)

AttentionKind = Literal["states", "relations", "maps"]
ATTENTION_KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)
AttentionDtype = Literal["float16", "int8"]
Positions = Annotated[Any, BeforeValidator(token_array)]


class AttentionLimits(SequenceLimits):
    """What one attention service accepts. `max_entries`: the most numbers returned for one sequence."""

    max_relation_heads: int = 256
    max_entries: int = 2**26


class AttentionShape(BaseModel):
    """The teacher's attention: total number of layers, the highest layer that is served, and the heads of a layer."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_layers: int
    max_layer: int
    query_heads: int
    kv_heads: int
    head_width: int

    @property
    def widths(self) -> dict[str, int]:
        """Numbers per position of queries, keys and values."""
        kv = self.kv_heads * self.head_width
        return {"query": self.query_heads * self.head_width, "key": kv, "value": kv}


@dataclass(frozen=True)
class AttentionSpec:
    """What is requested for every sequence of a request, with the layer as an index. Fields that the kind doesn't read
    are None or 0.

    Equal specs over equal tokens and rows have equal targets: engines batch by it.
    """

    kind: AttentionKind
    layer: int
    dtype: AttentionDtype = "float16"
    form: RelationForm | None = None
    relation_heads: int = 0
    block_size: int | None = None


@dataclass(frozen=True, eq=False)
class AttentionQuery:
    """A request for the attention of one sequence: its token ids [T], the spec, and the requested positions [r], None
    for all."""

    tokens_T: np.ndarray
    spec: AttentionSpec
    rows_r: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def num_rows(self) -> int:
        return len(self.tokens_T if self.rows_r is None else self.rows_r)

    @property
    def key(self) -> Hashable:
        """Equal for queries with equal targets."""
        rows = None if self.rows_r is None else hashlib.sha256(self.rows_r.tobytes()).digest()
        return hashlib.sha256(self.tokens_T.tobytes()).digest(), rows, self.spec


class AttentionRequest(SequencesRequest):
    """The body of `POST /v1/attention`.

    `sequences`: token ids, each [T]. `layer`: an index (negative: from the top), a fraction of the depth, or one of
    `relations.LAYER_NAMES`. `kind`: `states` (V, and Q and K after RoPE and any QK norm), from which every relation
    follows; `relations`, of `form`, re-split into `relation_heads`, masked by position if `causal` (None: as the form
    defines); or `maps`, the layer's attention probabilities, all of them or with `block_size` only those within blocks
    of that many positions. `rows`: for relations and maps, ascending positions per sequence; all if absent. `dtype`:
    `int8` is for states only. `fingerprint`: the teacher that must respond, compared by its first half; any if absent.
    """

    per_sequence: ClassVar[tuple[str, ...]] = ("sequences", "rows")
    tensor_fields: ClassVar[tuple[str, ...]] = ("sequences", "rows")

    layer: StrictInt | StrictFloat | StrictStr = "late_middle"
    kind: AttentionKind = "states"
    dtype: AttentionDtype = Field("float16", description="int8 is for states only")
    form: Literal["official", "paper", "minilm"] = Field("official", description="kind relations")
    relation_heads: StrictInt = Field(32, description="kind relations")
    causal: StrictBool | None = Field(
        None, description="kind relations: mask later positions; if absent, as the form defines"
    )
    block_size: StrictInt | None = Field(None, description="kind maps: only within blocks of this many positions")
    rows: Annotated[tuple[Positions, ...], Field(fail_fast=True)] | None = Field(
        None, description="kinds relations and maps: ascending positions for each sequence; all if absent"
    )

    @property
    def relation_form(self) -> RelationForm:
        """The requested form, with `causal` overridden if the request sets it."""
        form = FORMS[self.form]
        return form if self.causal is None else replace(form, causal=self.causal)

    def spec(self, num_layers: int) -> AttentionSpec:
        """The spec for a model with `num_layers` layers. ValueError for a layer that it does not have."""
        related = self.kind == "relations"
        return AttentionSpec(
            kind=self.kind,
            layer=layer_index(self.layer, num_layers=num_layers),
            dtype=self.dtype,
            form=self.relation_form if related else None,
            relation_heads=self.relation_heads if related else 0,
            block_size=self.block_size if self.kind == "maps" else None,
        )

    def query(self, index: int, num_layers: int) -> AttentionQuery:
        """The query for sequence `index`, to a model with `num_layers` layers."""
        return AttentionQuery(
            self.sequences[index], self.spec(num_layers), None if self.rows is None else self.rows[index]
        )

    def num_rows(self, index: int) -> int:
        """The number of positions requested of sequence `index`."""
        return len(self.sequences[index] if self.rows is None else self.rows[index])


class AttentionInfo(ServiceInfo):
    """The body of an attention service's `GET /v1/teacher`."""

    limits: AttentionLimits
    shape: AttentionShape
    kinds: tuple[AttentionKind, ...] = ATTENTION_KINDS
    service: Literal["attention"] = "attention"


def check_attention_request(request: AttentionRequest, limits: AttentionLimits, shape: AttentionShape) -> None:
    """Check a request against a service's limits. OutOfRangeError with the field, its value and the limit;
    NotFoundError for a layer that isn't served."""
    within("sequences", len(request.sequences), 1, limits.max_sequences, "sequences in a request")
    check_sequences(request, limits)
    _check_layer(request, shape)
    if request.kind == "relations":
        _check_relation_heads(request.relation_heads, limits, shape)
    if request.dtype == "int8" and request.kind != "states":
        refuse("dtype", "int8", "float16", f"float16 for {request.kind}: int8 is for states")
    if request.block_size is not None:
        if request.kind != "maps":
            refuse("block_size", request.block_size, None, f"none for kind {request.kind}: only maps have blocks")
        within("block_size", request.block_size, 1, limits.max_sequence_length, "positions in a block")
    _check_rows(request)
    for i in range(len(request.sequences)):
        entries = record_entries(request, i, shape)
        if entries > limits.max_entries:
            refuse(
                f"sequences.{i}", entries, limits.max_entries,
                f"at most {limits.max_entries} numbers in its record: request fewer `rows`, or kind states",
            )  # fmt: skip


def record_entries(request: AttentionRequest, index: int, shape: AttentionShape) -> int:
    """How many numbers are returned for sequence `index`."""
    length, rows = len(request.sequences[index]), request.num_rows(index)
    if request.kind == "states":
        return length * sum(shape.widths.values())
    if request.kind == "relations":
        return 3 * request.relation_heads * rows * length
    return shape.query_heads * rows * min(length, request.block_size or length)


def num_values(request: AttentionRequest, shape: AttentionShape) -> int:
    """How many numbers are returned for the whole request."""
    return sum(record_entries(request, i, shape) for i in range(len(request.sequences)))


def values_per_token(request: AttentionRequest, shape: AttentionShape) -> int:
    """Numbers returned per token, rounded up."""
    return math.ceil(num_values(request, shape) / request.num_tokens)


def attention_cost(request: AttentionRequest, shape: AttentionShape) -> int:
    """The cost by which an attention service admits this request: tokens x (values per token + 1)."""
    return request.num_tokens * (values_per_token(request, shape) + 1)


def _check_layer(request: AttentionRequest, shape: AttentionShape) -> None:
    try:
        layer = layer_index(request.layer, num_layers=shape.num_layers)
    except ValueError as error:
        if isinstance(request.layer, int):
            raise NotFoundError(str(error), field="layer", got=request.layer, limit=shape.max_layer) from None
        expected = f"one of {list(LAYER_NAMES)}, a fraction of the depth in [0, 1] or an index"
        refuse("layer", request.layer, shape.max_layer, expected)
    if layer > shape.max_layer:
        raise NotFoundError(
            f"layer: {request.layer!r} is layer {layer} of {shape.num_layers}, but this service holds layers 0 to "
            f"{shape.max_layer}: request one of those, or start it with --layer {layer}",
            field="layer", got=layer, limit=shape.max_layer,
        )  # fmt: skip


def _check_relation_heads(relation_heads: int, limits: AttentionLimits, shape: AttentionShape) -> None:
    within("relation_heads", relation_heads, 1, limits.max_relation_heads, "relation heads")
    widths = set(shape.widths.values())
    if any(width % relation_heads for width in widths):
        most = min(limits.max_relation_heads, *widths)
        divisors = [n for n in range(1, most + 1) if not any(width % n for width in widths)]
        refuse(
            "relation_heads", relation_heads, divisors,
            f"a divisor of the widths {shape.widths}: one of {', '.join(map(str, divisors))}",
        )  # fmt: skip


def _check_rows(request: AttentionRequest) -> None:
    if request.rows is None:
        return
    if request.kind == "states":
        refuse("rows", len(request.rows), None, "none for states: a relation needs the states of all positions")
    if len(request.rows) != len(request.sequences):
        refuse("rows", len(request.rows), len(request.sequences), "a list of positions for each sequence")
    for i, (rows_r, tokens_T) in enumerate(zip(request.rows, request.sequences, strict=True)):
        within(f"rows.{i}", len(rows_r), 1, len(tokens_T), "positions")
        if rows_r[0] < 0 or rows_r[-1] >= len(tokens_T) or (np.diff(rows_r) <= 0).any():
            refuse(f"rows.{i}", rows_r[:8].tolist(), len(tokens_T) - 1, f"ascending positions below {len(tokens_T)}")
