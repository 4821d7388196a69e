"""The protocol of document sources. Used by `feed`, `loader` and `held_out`."""

from collections.abc import Iterator
from typing import Protocol

from student_trainer.data.content import Content
from student_trainer.data.documents import RawDocument
from student_trainer.settings.data import SourceSettings


class Source(Protocol):
    """A source read in blocks: block k of a shard holds its documents from k x block_size on, in the epoch's order."""

    name: str
    settings: SourceSettings
    block_size: int
    fingerprint: str  # of all documents, from their number and `content`; independent of where they are stored
    content: Content

    def shards(self) -> int:
        """The number of shards in an epoch."""

    def read(self, epoch: int, shard: int, block: int) -> list[RawDocument]:
        """One block, shorter than `block_size` at the shard's end. Called from one thread only."""

    def scan(self) -> Iterator[list[RawDocument]]:
        """All documents once, in blocks, in an order that does not depend on the seed."""
