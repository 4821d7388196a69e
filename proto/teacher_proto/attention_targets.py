"""`AttentionTargets`, the attention service's record of one sequence, and the checks that it is a valid one.

The service makes it, `wire` encodes and decodes it, the trainer's relation loss reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from teacher_proto.attention import AttentionKind, AttentionQuery, AttentionShape, AttentionSpec
from teacher_proto.errors import InvalidTargetsError

PARTS = ("query", "key", "value")
# The tensors in the order of the keys of an `attention` message, and of its checksum, with their dtypes on the wire.
ATTENTION_TENSORS: dict[str, tuple[str, ...]] = {
    "rows": ("<i4",),
    "query": ("<f2", "|i1"),
    "query_scale": ("<f4",),
    "key": ("<f2", "|i1"),
    "key_scale": ("<f4",),
    "value": ("<f2", "|i1"),
    "value_scale": ("<f4",),
    "maps": ("<f2",),
}
# fp16 keeps 11 bits of a probability, and flushes those below 6e-8 to zero, however long the row is.
MASS_TOLERANCE = 2.0**-8


@dataclass(frozen=True, eq=False)
class AttentionTargets:
    """The teacher's attention at one layer over one sequence of T positions; tensors that were not requested are None.

    - states: query [T, H, dh], key and value [T, H_kv, dh]; fp16, or int8 to be multiplied by its scale [T, H or
      H_kv, 1] in fp32.
    - relations: query, key and value [R, r, T] fp16: row i is the distribution of position rows[i] over all positions.
    - maps: maps [H, r, T] fp16, or [H, r, b] within blocks of b: column j of position t is its attention to position
      t // b * b + j, normalised over the whole map; 0 after t and beyond the end.

    `layer` counts from 0. rows [r] int32 ascends; None means all positions.
    """

    kind: AttentionKind
    layer: int
    rows: np.ndarray | None = None
    query: np.ndarray | None = None
    query_scale: np.ndarray | None = None
    key: np.ndarray | None = None
    key_scale: np.ndarray | None = None
    value: np.ndarray | None = None
    value_scale: np.ndarray | None = None
    maps: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors that are present, in wire order."""
        present = ((name, getattr(self, name)) for name in ATTENTION_TENSORS)
        return {name: array for name, array in present if array is not None}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors().values())

    def states(self) -> dict[str, np.ndarray]:
        """query, key and value as float32 [T, H, dh], int8 multiplied by its scale. For kind states."""
        assert self.kind == "states", "states() is for kind states"
        arrays = self.tensors()
        wide = {part: arrays[part].astype(np.float32) for part in PARTS}
        return {part: x * arrays[f"{part}_scale"] if f"{part}_scale" in arrays else x for part, x in wide.items()}


def check_attention(targets: AttentionTargets, query: AttentionQuery, shape: AttentionShape) -> None:
    """Check that a record can be the response to `query`. InvalidTargetsError says why not.

    Checks kind, layer, presence, dtypes and shapes; that states are finite and not all zero; that probabilities are
    from 0 to 1, sum to 1 per row (within blocks: to at most 1), and are 0 for later positions where those are masked.
    """
    spec = query.spec
    if (targets.kind, targets.layer) != (spec.kind, spec.layer):
        raise InvalidTargetsError(
            f"got {targets.kind} of layer {targets.layer}, expected {spec.kind} of layer {spec.layer}"
        )
    arrays = targets.tensors()
    expected = expected_shapes(query, shape)
    if set(arrays) != set(expected):
        raise InvalidTargetsError(f"got tensors {sorted(arrays)}, expected {sorted(expected)}")
    for name, array in arrays.items():
        dtype = "|i1" if spec.dtype == "int8" and name in PARTS else ATTENTION_TENSORS[name][0]
        if array.shape != expected[name] or array.dtype.newbyteorder("<").str != dtype:
            raise InvalidTargetsError(
                f"{name}: got {array.dtype} of shape {list(array.shape)}, expected {dtype} of {list(expected[name])}"
            )
    if query.rows_r is not None and not np.array_equal(arrays["rows"], query.rows_r):
        raise InvalidTargetsError("rows are not the requested positions")
    rows_r = np.arange(query.num_tokens) if query.rows_r is None else query.rows_r
    if spec.kind == "states":
        _check_states(arrays)
    else:
        for name in PARTS if spec.kind == "relations" else ("maps",):
            _check_probabilities(arrays[name], name, rows_r, spec)


def expected_shapes(query: AttentionQuery, shape: AttentionShape) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that `query` requests."""
    spec, length, num_rows = query.spec, query.num_tokens, query.num_rows
    shapes: dict[str, tuple[int, ...]] = {} if query.rows_r is None else {"rows": (num_rows,)}
    if spec.kind == "maps":
        return shapes | {"maps": (shape.query_heads, num_rows, min(length, spec.block_size or length))}
    if spec.kind == "relations":
        return shapes | dict.fromkeys(PARTS, (spec.relation_heads, num_rows, length))
    for part in PARTS:
        heads = shape.query_heads if part == "query" else shape.kv_heads
        shapes[part] = (length, heads, shape.head_width)
        if spec.dtype == "int8":
            shapes[f"{part}_scale"] = (length, heads, 1)
    return shapes


def _check_states(arrays: dict[str, np.ndarray]) -> None:
    for part in PARTS:
        states_THd = arrays[part]
        scale_TH1 = arrays.get(f"{part}_scale")
        if scale_TH1 is not None and not (np.isfinite(scale_TH1) & (scale_TH1 >= 0)).all():
            raise InvalidTargetsError(f"{part}_scale: negative, NaN or infinite")
        if states_THd.dtype.kind == "f" and not np.isfinite(states_THd).all():
            raise InvalidTargetsError(f"{part}: NaN or infinite")
        # A single position may be all zero: the embedding of a padding token is, in many models.
        if not states_THd.any():
            raise InvalidTargetsError(f"{part}: all zero at every position: nothing was computed")


def _check_probabilities(table: np.ndarray, name: str, rows_r: np.ndarray, spec: AttentionSpec) -> None:
    """`table` is [heads, r, columns]. NaN fails every comparison."""
    wide = table.astype(np.float32)
    if not ((wide >= 0) & (wide <= 1 + MASS_TOLERANCE)).all():
        raise InvalidTargetsError(f"{name}: a probability is NaN, below 0 or above 1")
    mass = wide.sum(axis=-1)
    low = 0.0 if spec.block_size else 1 - MASS_TOLERANCE
    if not ((mass >= low) & (mass <= 1 + MASS_TOLERANCE)).all():
        raise InvalidTargetsError(f"{name}: the probabilities of a row sum to {float(mass.min()):g}, not to 1")
    if spec.kind == "maps" or (spec.form is not None and spec.form.causal):
        place_r = rows_r % spec.block_size if spec.block_size else rows_r
        later_rC = np.arange(table.shape[-1]) > place_r[:, None]
        if table[:, later_rC].any():
            raise InvalidTargetsError(f"{name}: a probability above 0 for a later position")


assert {field.name for field in fields(AttentionTargets)} == {"kind", "layer", *ATTENTION_TENSORS}
