"""What a source of documents promises, wherever it reads them. Used by `feed` and whoever reads all of a source."""

from collections.abc import Iterator
from typing import Protocol

from student_trainer.data.content import Content
from student_trainer.data.documents import RawDocument
from student_trainer.settings.data import SourceSettings


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
