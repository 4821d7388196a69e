"""Codecs of a shard's rows: lossless, or compact. Called by `shards.py`; one object per shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from teacher_proto.dataset.compact import MAX_BITS, MIN_BITS, Compact
from teacher_proto.dataset.manifest import Manifest
from teacher_proto.store.entry import Entry
from teacher_proto.store.parquet import Pair
from teacher_proto.targets import TokenTargets

# Names in manifests, one for each layout, so that an older version refuses what it can't read; and names for `--codec`.
COMPACT: Mapping[str, int] = {"compact": 1, "compact2": 2}
_CODEC_NAMES: Mapping[str, str] = {"compact": "compact2", "compact1": "compact"}


class Codec(Protocol):
    """`columns`: the codec's additional columns, name to Arrow type."""

    @property
    def columns(self) -> Mapping[str, str]: ...

    def learn(self, pairs: Iterable[Pair]) -> None:
        """Called with the contents of the shard's first row group, before anything is encoded."""
        ...

    def encode(self, row: dict[str, Any], entry: Entry, targets: TokenTargets) -> dict[str, Any]:
        """The row to write, from the row that `as_row` makes."""
        ...

    def decode(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row that `as_row` made, exactly or approximately."""
        ...

    def state(self) -> bytes:
        """What a reader needs besides the row; it is stored in the footer."""
        ...

    def restore_state(self, state: bytes) -> None: ...

    def errors(self) -> dict[str, float] | None:
        """Errors over all rows so far: sums, and maxima under names that begin with `max_`; None if lossless."""
        ...


class Lossless:
    """Rows unchanged; only Parquet's own encodings and zstd make them smaller."""

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
    """A new object of the codec that a manifest names. ValueError for one that this version does not know."""
    name = str(manifest.codec.get("name"))
    if name == "lossless":
        return Lossless()
    if name in COMPACT:
        return Compact(int(manifest.codec["bits"]), manifest.teacher.limits.vocab_size, COMPACT[name])
    known = ", ".join(("lossless", *COMPACT))
    raise ValueError(f"the dataset's codec is {name!r}; this version reads {known}: update stillhouse")


def parse_codec(text: str) -> dict[str, Any]:
    """A manifest's codec from `lossless`, `compact` or `compact:BITS`. `compact1:BITS` is the older layout, for adding
    to a dataset that was begun with it. ValueError for anything else.
    """
    name, _, bits = text.partition(":")
    if text == "lossless":
        return {"name": "lossless"}
    if name not in _CODEC_NAMES or not (bits or "8").isdigit() or not MIN_BITS <= int(bits or 8) <= MAX_BITS:
        raise ValueError(
            f"--codec {text}: expected lossless, compact or compact:BITS with {MIN_BITS} to {MAX_BITS} bits"
        )
    return {"name": _CODEC_NAMES[name], "bits": int(bits or 8)}
