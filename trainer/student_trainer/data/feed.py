"""Tokenised documents of one source, read and tokenised ahead of use on worker threads. Used by `loader`.

It is a cache without state: documents can be requested in any order, and those that follow are fetched ahead. Each
source is read by one thread, so sources need no locks; all share one pool for tokenising.
"""

import threading
import time
from collections import OrderedDict
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from student_trainer.data.documents import RawDocument, is_held_out
from student_trainer.data.mixture import Cursor
from student_trainer.data.source import Source
from student_trainer.data.tokenise import TokenDocument, Tokeniser

Address = tuple[int, int, int]  # epoch, shard, block


@dataclass(frozen=True)
class Block:
    """A block of documents; None for those that are held out or have no tokens."""

    documents: list[TokenDocument | None]
    is_last: bool  # whether the shard ends with this block


class Rate:
    """Number of tokens made and the CPU time they took, summed over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tokens = 0
        self.seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        with self._lock:
            self.tokens += tokens
            self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of CPU time of one worker thread; 0 before the first block."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Feed:
    """The training documents of one source by cursor, with the next blocks prefetched."""

    def __init__(self, source: Source, tokeniser: Tokeniser, pool: Executor, rate: Rate, ahead: int) -> None:
        self.source = source
        self.tokeniser, self._pool, self._rate, self._ahead = tokeniser, pool, rate, ahead
        self._reader = ThreadPoolExecutor(1, f"read-{source.name}")
        self._lock = threading.RLock()
        self._blocks: OrderedDict[Address, Future[Block]] = OrderedDict()  # in reading order, the current one first
        self._closed = False
        self._next: Address | None = None  # what to read after the last block; None while that is read
        self._answer: tuple[Cursor, tuple[Cursor, TokenDocument]] | None = None  # last argument and result of `first`

    def first(self, cursor: Cursor) -> tuple[Cursor, TokenDocument]:
        """The first training document at or after `cursor`, with its cursor. Blocks until it has been read."""
        # At the end of an epoch, the same cursor is requested until all unfinished documents are read. Its document is
        # in the next epoch's blocks; searching again would go back a block and drop the prefetched ones.
        if self._answer is None or self._answer[0] != cursor:
            self._answer = cursor, self._search(cursor)
        return self._answer[1]

    def _search(self, cursor: Cursor) -> tuple[Cursor, TokenDocument]:
        start = cursor
        while cursor.epoch <= start.epoch + 1:
            # Cursors count documents within a shard; documents are read and tokenised in blocks.
            number, place = divmod(cursor.document, self.source.block_size)
            address = (cursor.epoch, cursor.shard, number)
            block = self._block(address)
            if place < len(block.documents):
                document = block.documents[place]
                if document is not None:
                    return cursor, document
                cursor = replace(cursor, document=cursor.document + 1, offset=0)
            else:
                epoch, shard, _ = self._after(address, is_last=True)
                cursor = Cursor(epoch, shard)
        settings = self.source.settings
        raise ValueError(
            f"source {self.source.name!r} has no document to train on: all of them are held out "
            f"(held_out_fraction={settings.held_out_fraction}) or have no tokens; lower the fraction or add documents"
        )

    @property
    def skipped(self) -> int:
        """The number of bad documents skipped so far."""
        return self.tokeniser.skipped

    def close(self) -> None:
        """Stop reading; waits for the block that is being read."""
        with self._lock:
            self._closed, self._answer = True, None
        self._reader.shutdown(cancel_futures=True)

    def _block(self, address: Address) -> Block:
        with self._lock:
            if self._closed:
                raise ValueError(f"source {self.source.name!r} is closed")
            held = self._blocks.get(address)
            failed = held is not None and held.done() and held.exception() is not None
            if held is None or failed:  # a failed block is read again when it is requested again
                self._blocks.clear()
                self._request(address)
            while next(iter(self._blocks)) != address:
                self._blocks.popitem(last=False)
            self._extend()
            future = self._blocks[address]
        return future.result()

    def _extend(self) -> None:
        if self._next is not None and not self._closed and len(self._blocks) <= self._ahead:
            self._request(self._next)

    def _request(self, address: Address) -> None:
        block: Future[Block] = Future()
        self._blocks[address] = block
        self._next = None
        # One reader per source, so that blocks are read in order; they may be tokenised in any order.
        self._reader.submit(self.source.read, *address).add_done_callback(partial(self._on_read, address, block))

    def _on_read(self, address: Address, block: Future[Block], raw: Future[list[RawDocument]]) -> None:
        """On the reader's thread: submit the block for tokenising, and request the next one."""
        if raw.cancelled():
            block.cancel()
            return
        if error := raw.exception():
            block.set_exception(error)
            return
        documents = raw.result()
        is_last = len(documents) < self.source.block_size
        self._pool.submit(self._tokenise, documents, is_last).add_done_callback(partial(_pass_on, block))
        with self._lock:
            if self._blocks.get(address) is block and next(reversed(self._blocks)) == address:
                self._next = self._after(address, is_last)
                self._extend()

    def _tokenise(self, documents: list[RawDocument], is_last: bool) -> Block:
        began = time.thread_time()
        fraction = self.source.settings.held_out_fraction
        # Held-out documents stay as None, so that a cursor means the same whatever is held out.
        wanted = [i for i, d in enumerate(documents) if not is_held_out(d.content, fraction)]
        made: list[TokenDocument | None] = [None] * len(documents)
        for i, document in zip(wanted, self.tokeniser([documents[i] for i in wanted]), strict=True):
            made[i] = document
        self._rate.add(sum(len(d.ids_N) for d in made if d), time.thread_time() - began)
        return Block(made, is_last)

    def _after(self, address: Address, is_last: bool) -> Address:
        epoch, shard, block = address
        if not is_last:
            return epoch, shard, block + 1
        return (epoch, shard + 1, 0) if shard + 1 < self.source.shards() else (epoch + 1, 0, 0)


def _pass_on(block: Future[Block], made: Future[Block]) -> None:
    if made.cancelled():
        block.cancel()
    elif error := made.exception():
        block.set_exception(error)
    else:
        block.set_result(made.result())
