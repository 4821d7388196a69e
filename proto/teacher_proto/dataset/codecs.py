"""How a shard keeps the tensors of a row: as they are, or in fewer bytes. Called by `shards.py`; one object a shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from teacher_proto.dataset.compact import MAX_BITS, MIN_BITS, Compact
from teacher_proto.dataset.manifest import Manifest
from teacher_proto.store.entry import Entry
from teacher_proto.store.parquet import Pair
from teacher_proto.targets import TokenTargets

# In manifests: a name for each layout, so that an older version refuses what it can't read. And in `--codec`.
COMPACT: Mapping[str, int] = {"compact": 1, "compact2": 2}
_TOLD: Mapping[str, str] = {"compact": "compact2", "compact1": "compact"}


class Codec(Protocol):
    """`columns`: those beside the ones of every shard, name to Arrow type."""

    @property
    def columns(self) -> Mapping[str, str]: ...

    def learn(self, pairs: Iterable[Pair]) -> None:
        """What the shard's first row group holds, before anything is encoded."""
        ...

    def encode(self, row: dict[str, Any], entry: Entry, targets: TokenTargets) -> dict[str, Any]:
        """A row as it is written, out of the row that `as_row` makes."""
        ...

    def decode(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row that `as_row` made, or one near it."""
        ...

    def state(self) -> bytes:
        """What a reader needs beside the row, for the footer."""
        ...

    def restore_state(self, state: bytes) -> None: ...

    def errors(self) -> dict[str, float] | None:
        """Of all rows so far: sums, and maxima under names that begin with `max_`; None where nothing is lost."""
        ...


class Lossless:
    """Rows as they are; Parquet's own encodings and zstd make them smaller."""

    columns: ClassVar[Mapping[str, str]] = {}

    def learn(self, pairs: Iterable[Pair]) -> None:
        del pairs

    def encode(self, row: dict[str, Any], entry: Entry, targets: TokenTargets) -> dict[str, Any]:
        del entry, targets
        return row

    def decode(self, row: dict[str, Any]) -> dict[str, Any]:
        return row

    def state(self) -> bytes:
        return b""

    def restore_state(self, state: bytes) -> None:
        assert not state

    def errors(self) -> None:
        return None


def codec_of(manifest: Manifest) -> Codec:
    """The codec that a manifest names, fresh. ValueError for one that this version does not know."""
    name = str(manifest.codec.get("name"))
    if name == "lossless":
        return Lossless()
    if name in COMPACT:
        return Compact(int(manifest.codec["bits"]), manifest.teacher.limits.vocab_size, COMPACT[name])
    known = ", ".join(("lossless", *COMPACT))
    raise ValueError(f"the dataset's codec is {name!r}; this version reads {known}: update stillhouse")


def parse_codec(text: str) -> dict[str, Any]:
    """The codec of a manifest out of `lossless`, `compact` or `compact:BITS`; `compact1:BITS`, the older layout, goes
    on with a dataset that was begun with it. ValueError for what is none.
    """
    name, _, bits = text.partition(":")
    if text == "lossless":
        return {"name": "lossless"}
    if name not in _TOLD or not (bits or "8").isdigit() or not MIN_BITS <= int(bits or 8) <= MAX_BITS:
        raise ValueError(
            f"--codec {text}: lossless, compact or compact:BITS with {MIN_BITS} to {MAX_BITS} bits was expected"
        )
    return {"name": _TOLD[name], "bits": int(bits or 8)}
