"""What sources hand out, what they promise, and which documents are kept from training. Used all over this package."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from student_trainer.data.content import Content
from student_trainer.settings.data import SourceSettings


@dataclass(frozen=True)
class RawDocument:
    """A document as it lies in the source: text, {"messages", "tools"}, or token ids."""

    index: str  # names it within the source: "17", or in a stream "shard/17"
    content: Any


class Source(Protocol):
    """A source in blocks: block k of a shard holds its documents k x block_size onwards, in the order of the epoch."""

    name: str
    settings: SourceSettings
    block_size: int
    fingerprint: str  # of all documents, wherever they lie: what `content` holds, and how many there are
    content: Content

    def shards(self) -> int:
        """How many shards an epoch has."""

    def read(self, epoch: int, shard: int, block: int) -> list[RawDocument]:
        """One block; shorter than `block_size` at the shard's end. Called by one thread."""

    def scan(self) -> Iterator[list[RawDocument]]:
        """All documents once, in blocks, in an order that is the same for every seed."""


def canonical(content: Any) -> str:
    """A document as one string, equal for equal documents."""
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)


def is_held_out(content: Any, fraction: float) -> bool:
    """Whether a document is kept from training: by its hash, so copies fall on the same side, whatever the seed."""
    if fraction <= 0:
        return False
    data = canonical(content).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64
