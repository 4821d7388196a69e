"""Packed rows: a teacher's targets as one row of bytes per position, and unpacking them into columns. Only needs numpy.

Engines write such rows on their device (`reduction.py`), so that a single tensor per sequence leaves it; the service
splits them into the columns of `TokenTargets` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import HIDDEN_DTYPES, TENSORS, TokenTargets, id_dtype, tensors_of

# Not in a packed row, but computed from its draws (`count_draws`).
_MADE_OF_DRAWS = ("sampled_offsets", "sampled_counts")


@dataclass(frozen=True)
class RowLayout:
    """Where each tensor lies in a packed row: the spec, and the sizes that do not follow from it.

    `gather_width` is G of kind `gather`, `hidden_size` D of kind `hidden`; no other kind reads them.
    """

    spec: TargetSpec
    vocab_size: int
    gather_width: int = 0
    hidden_size: int = 0

    @property
    def dtype(self) -> np.dtype:
        """The numpy record dtype of one row, without gaps. Ids are uint16, or three bytes if V needs them."""
        spec = self.spec
        sizes = {"K": spec.top_k, "T": len(spec.temperatures), "G": self.gather_width, "M": spec.num_samples,
                 "D": self.hidden_size}  # fmt: skip
        fields: list[Any] = []
        for name in tensors_of(spec.kinds):
            if name in _MADE_OF_DRAWS or (name == "hidden_scale" and spec.hidden_dtype != "int8"):
                continue
            # The axes within one row: M is num_samples here, the draws of one row.
            shape = tuple(sizes[axis] for axis in TENSORS[name].axes if axis != "R")
            kind = TENSORS[name].dtypes[0]
            if name in ("ids", "sampled_ids"):
                kind = id_dtype(self.vocab_size)
            elif name == "hidden":
                kind = HIDDEN_DTYPES[spec.hidden_dtype or "float16"]
            fields.append((name, "u1", (*shape, 3)) if kind == "u3" else (name, kind, shape))
        return np.dtype(fields)

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize


def layout_of(query: Query, vocab_size: int, hidden_size: int) -> RowLayout:
    """The layout of the rows for `query`; `hidden_size` is the teacher's."""
    spec = query.spec
    return RowLayout(spec, vocab_size, query.gather_width, hidden_size if "hidden" in spec.kinds else 0)


def unpack_rows(packed_RB: np.ndarray, start: int, layout: RowLayout) -> TokenTargets:
    """`TokenTargets` from packed rows [R, row_bytes] uint8 that begin at position `start`; the columns are copies.

    ValueError if the rows do not have the length of `layout`.
    """
    dtype = layout.dtype
    if packed_RB.dtype != np.uint8 or packed_RB.ndim != 2 or packed_RB.shape[1] != dtype.itemsize:
        raise ValueError(f"rows are {packed_RB.dtype} {packed_RB.shape}, expected uint8 [R, {dtype.itemsize}]")
    record_R = np.ascontiguousarray(packed_RB).reshape(-1).view(dtype)
    columns: dict[str, np.ndarray] = {}
    for name in dtype.names or ():
        column = record_R[name]
        if name in ("ids", "sampled_ids"):
            column = _ids(column)
        columns[name] = np.ascontiguousarray(column)
    if "sampled_ids" in columns:
        columns |= count_draws(columns.pop("sampled_ids"))
    assert set(columns) <= set(TENSORS)
    return TokenTargets(start=start, **columns)


def _ids(column: np.ndarray) -> np.ndarray:
    """Ids as uint16 unchanged; three-byte ids, [..., 3] uint8, as int32."""
    if column.dtype != np.uint8:
        return column
    wide = np.zeros((*column.shape[:-1], 4), dtype=np.uint8)
    wide[..., :3] = column
    return wide.view("<i4")[..., 0]


def count_draws(drawn_RM: np.ndarray) -> dict[str, np.ndarray]:
    """The ragged tensors of kind `sampled` from ascending draws [R, M]: each id once per row, with its count."""
    first_RM = np.ones(drawn_RM.shape, dtype=bool)
    first_RM[:, 1:] = drawn_RM[:, 1:] != drawn_RM[:, :-1]
    begins = np.flatnonzero(first_RM)
    counts = np.diff(begins, append=drawn_RM.size)
    offsets = np.concatenate(([0], first_RM.sum(axis=1).cumsum())).astype(np.int32)
    return {
        "sampled_offsets": offsets,
        "sampled_ids": drawn_RM.reshape(-1)[begins],
        "sampled_counts": counts.astype(np.uint16),
    }
