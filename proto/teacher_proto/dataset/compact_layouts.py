"""How the codec `compact` stores the numbers of its rows in byte columns: one class per version. Used by `compact`.

A layout packs `places_RK`, the ids' places in ascending order, `levels_RK`, and the float16 columns of a row: three of
its scale, then the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from teacher_proto.dataset.packing import one_by_one, planes, rice, several_a_byte, unplanes, unrice

SCALE_COLUMNS = 3


@dataclass(frozen=True, eq=False)
class Packed:
    """What a layout packs; `columns_CR` are float16."""

    places_RK: np.ndarray
    levels_RK: np.ndarray
    columns_CR: np.ndarray


class Layout(Protocol):
    """`columns`: the columns of the shard that it fills, name to Arrow type."""

    @property
    def columns(self) -> Mapping[str, str]: ...

    def pack(self, packed: Packed) -> dict[str, bytes]: ...

    def unpack(self, row: Mapping[str, Any], rows: int, top_k: int) -> Packed: ...


class Planes:
    """Version 1: differences of places as byte planes, which zstd compresses; one byte per level."""

    columns: ClassVar[Mapping[str, str]] = {
        "coded_ids": "large_binary", "coded_logprobs": "large_binary", "coded_rows": "large_binary",
    }  # fmt: skip

    def __init__(self, bits: int, vocab_size: int):
        del bits
        self._planes = 2 if vocab_size <= 2**16 else 3

    def pack(self, packed: Packed) -> dict[str, bytes]:
        return {
            # The first place, then differences: because of `prepend=0`, a cumulative sum restores the places.
            "coded_ids": planes(np.diff(packed.places_RK, axis=1, prepend=0), self._planes),
            "coded_logprobs": packed.levels_RK.tobytes(),
            "coded_rows": planes(packed.columns_CR.view(np.uint16), 2),
        }

    def unpack(self, row: Mapping[str, Any], rows: int, top_k: int) -> Packed:
        places_RK = np.cumsum(unplanes(row["coded_ids"], self._planes).reshape(rows, top_k), axis=1)
        levels_RK = np.frombuffer(row["coded_logprobs"], np.uint8).reshape(rows, top_k)
        return Packed(places_RK, levels_RK, _columns(row["coded_rows"], rows))


class Gaps:
    """Version 2: gaps between places in a Rice code; several levels per byte; the scale in a separate column."""

    columns: ClassVar[Mapping[str, str]] = {
        "coded_ids": "large_binary", "coded_widths": "large_binary", "coded_logprobs": "large_binary",
        "coded_scales": "large_binary", "coded_rows": "large_binary",
    }  # fmt: skip

    def __init__(self, bits: int, vocab_size: int):
        del vocab_size
        self._bits = bits

    def pack(self, packed: Packed) -> dict[str, bytes]:
        # Places of a row differ by at least 1, so gaps, which are difference - 1, start at 0.
        widths, code = rice(np.diff(packed.places_RK, axis=1, prepend=-1) - 1)
        scale, rest = np.split(packed.columns_CR, [SCALE_COLUMNS])
        return {
            "coded_ids": code, "coded_widths": widths,
            "coded_logprobs": several_a_byte(packed.levels_RK, self._bits),
            "coded_scales": planes(scale.view(np.uint16), 2), "coded_rows": planes(rest.view(np.uint16), 2),
        }  # fmt: skip

    def unpack(self, row: Mapping[str, Any], rows: int, top_k: int) -> Packed:
        # The inverse: + 1 for each difference, and - 1 for the -1 that was prepended.
        places_RK = np.cumsum(unrice(row["coded_widths"], row["coded_ids"], rows) + 1, axis=1) - 1
        levels_RK = one_by_one(row["coded_logprobs"], self._bits, rows * top_k).reshape(rows, top_k)
        columns = [_columns(row[name], rows) for name in ("coded_scales", "coded_rows")]
        return Packed(places_RK, levels_RK, np.concatenate(columns))


def _columns(data: bytes, rows: int) -> np.ndarray:
    return unplanes(data, 2).astype(np.uint16).reshape(-1, rows).view(np.float16)


LAYOUTS: Mapping[int, type[Planes] | type[Gaps]] = {1: Planes, 2: Gaps}
