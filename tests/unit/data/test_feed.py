"""The feed: right in any order of asking, a bounded way ahead, and able to go on after a failure."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from student_trainer.data.content import Content
from student_trainer.data.documents import RawDocument
from student_trainer.data.feed import Feed, Rate
from student_trainer.data.mixture import Cursor
from student_trainer.data.tokenise import Tokeniser, plain_backend
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import inline, tokenizer

AHEAD = 3


class Counted:
    """Two shards of 100 and 30 documents in blocks of ten; keeps the addresses read, and fails when told to."""

    name, block_size, fingerprint, content = "s", 10, "f", Content(130, ())

    def __init__(self) -> None:
        self.settings: SourceSettings = inline(["x"])
        self.read_addresses: list[tuple[int, int, int]] = []
        self.fail_at: tuple[int, int, int] | None = None

    def shards(self) -> int:
        return 2

    def read(self, epoch: int, shard: int, block: int) -> list[RawDocument]:
        assert threading.current_thread().name.startswith("read-s")
        self.read_addresses.append((epoch, shard, block))
        if (epoch, shard, block) == self.fail_at:
            raise ValueError("the disk is on fire")
        count = (100, 30)[shard]
        return [
            RawDocument(f"{shard}/{i}", f"{epoch} {shard} {i}") for i in range(block * 10, min(count, block * 10 + 10))
        ]

    def scan(self) -> Iterator[list[RawDocument]]:
        raise NotImplementedError


@contextmanager
def feed(source: Counted) -> Iterator[Feed]:
    settings = DataSettings(sources={"s": source.settings})
    tokeniser = Tokeniser("s", tokenizer(), plain_backend(tokenizer()), settings)
    with ThreadPoolExecutor(2) as pool:
        made = Feed(source, tokeniser, pool, Rate(), AHEAD)
        try:
            yield made
        finally:
            made.close()


def test_documents_follow_one_another_over_shards_and_epochs() -> None:
    with feed(Counted()) as made:
        cursor, seen = Cursor(), []
        for _ in range(300):
            cursor, document = made.first(cursor)
            seen.append((cursor.epoch, document.index))
            cursor = Cursor(cursor.epoch, cursor.shard, cursor.document + 1)
    epoch = [f"0/{i}" for i in range(100)] + [f"1/{i}" for i in range(30)]
    assert seen == [(e, name) for e in range(3) for name in epoch][:300]


def test_any_place_may_be_asked_for_in_any_order() -> None:
    with feed(Counted()) as made:
        for epoch, shard, document in [(0, 0, 57), (4, 1, 29), (0, 0, 0), (0, 0, 99), (7, 0, 31), (4, 1, 2)]:
            place = Cursor(epoch, shard, document)
            cursor, found = made.first(place)
            assert cursor == place and found.index == f"{shard}/{document}"


def test_no_more_than_its_share_is_read_ahead() -> None:
    source = Counted()
    with feed(source) as made:
        for document in range(0, 100, 10):
            made.first(Cursor(document=document))
            assert len(made._blocks) <= AHEAD + 1
    assert source.read_addresses[:10] == [(0, 0, block) for block in range(10)]


def test_asking_again_at_the_end_of_an_epoch_reads_nothing_again() -> None:
    source = Counted()
    end = Cursor(shard=1, document=30)  # after the last document: the mixer asks so until all that are begun are read
    with feed(source) as made:
        made.first(Cursor(shard=1, document=29))
        for _ in range(20):
            cursor, document = made.first(end)
            assert cursor == Cursor(epoch=1) and document.index == "0/0"
    # The last block may be read twice, to find that there is nothing after it.
    assert len(source.read_addresses) <= 2 * (AHEAD + 1)


def test_a_failure_reaches_the_caller_and_the_next_call_tries_again() -> None:
    source = Counted()
    source.fail_at = (0, 0, 2)
    with feed(source) as made:
        assert made.first(Cursor(document=19))[1].index == "0/19"
        for _ in range(2):
            with pytest.raises(ValueError, match="the disk is on fire"):
                made.first(Cursor(document=20))
        source.fail_at = None
        assert made.first(Cursor(document=20))[1].index == "0/20"
        assert made.first(Cursor(document=45))[1].index == "0/45"


def test_a_closed_feed_says_so() -> None:
    with feed(Counted()) as made:
        made.first(Cursor())
        made.close()
        with pytest.raises(ValueError, match="is closed"):
            made.first(Cursor())
