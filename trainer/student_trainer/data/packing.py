"""Draws sequences from the mixture, cuts them to the available space, and packs them into the rows of a batch, with one
function per packing mode. Called by `loader`; `held_out` cuts and packs its own.

best_fit: documents stay intact where possible (longer ones are cut every `seq_len` tokens) and go to the row with the
least space that still fits. A sequence that fits nowhere waits in the mixture state for the next batch, where the ones
that have waited longest are placed first. wrapped: each row is filled to its last token, and documents are cut there.
none: one sequence per row.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from student_trainer.batch.batch import Placed
from student_trainer.data.feed import Feed
from student_trainer.data.mixture import Cursor, Mixer, MixtureState
from student_trainer.data.tokenise import TokenDocument
from student_trainer.settings.data import DataSettings

Start = tuple[int, Cursor]  # a source, and where a sequence begins in it


@dataclass(frozen=True)
class Drawn:
    """A sequence that is not placed in a row yet."""

    start: Start
    sequence: Placed


def cut(source: int, name: str, document: TokenDocument, offset: int, space: int) -> Placed:
    """The prefix and the document's tokens from `offset` on, as many as fit in `space`."""
    stop = min(len(document.ids_N), offset + space - len(document.prefix))
    assert stop > offset
    whole = offset == 0 and stop == len(document.ids_N)
    key = f"{name}:{document.index}" + ("" if whole else f":{offset}")
    prefix_N = np.array(document.prefix, np.int32)
    counts_N = None
    if document.counts_N is not None:
        # The prefix is not learnt.
        counts_N = np.concatenate([np.zeros(len(prefix_N), bool), document.counts_N[offset:stop]])
    return Placed(source, key, np.concatenate([prefix_N, document.ids_N[offset:stop]]), counts_N)


class Draws:
    """Draws sequences by the mixture's rule, and records each draw with the mixer."""

    def __init__(self, mixer: Mixer, feeds: Sequence[Feed], documents: dict[Start, TokenDocument]) -> None:
        """documents: those that the mixer's slots and the pending sequences are cut from."""
        self._mixer, self._feeds, self._documents = mixer, feeds, documents

    def next(self, space: int) -> Drawn | None:
        """The next sequence, of at most `space` tokens. None, and nothing is recorded, if not even one token fits."""
        source = self._mixer.next_source()
        cursor = self._mixer.cursor(source)
        slot = self._mixer.turn(source)
        if slot is None:
            first, document = self._feeds[source].first(cursor)
            # No document of the next epoch may begin before those of this one are finished.
            slot = self._mixer.unfinished(source, first.epoch)
        if slot is None:
            start, cursor = first, replace(first, document=first.document + 1)
            self._documents[source, start] = document
        else:
            start, document = slot, self._documents[source, replace(slot, offset=0)]
        # A prefix without a token after it teaches nothing.
        if space <= len(document.prefix):
            return None
        sequence = cut(source, self._feeds[source].source.name, document, start.offset, space)
        stop = start.offset + len(sequence.ids_N) - len(document.prefix)
        rest = None if stop == len(document.ids_N) else replace(start, offset=stop)
        self._mixer.drawn(source, len(sequence.ids_N), cursor, slot, rest)
        return Drawn((source, start), sequence)

    def again(self, start: Start, space: int) -> Drawn:
        """A pending sequence, drawn and recorded earlier."""
        source, cursor = start
        document = self._documents[source, replace(cursor, offset=0)]
        return Drawn(start, cut(source, self._feeds[source].source.name, document, cursor.offset, space))


def documents_in_use(state: MixtureState) -> list[Start]:
    """The documents that are partly read or pending, sorted by source and by position in it."""
    open_slots = [(i, slot) for i, source in enumerate(state.sources) for slot in source.slots if slot]
    return sorted({(i, replace(cursor, offset=0)) for i, cursor in (*open_slots, *state.pending)})


def fetch_in_use(
    state: MixtureState, feeds: Sequence[Feed], at_hand: Mapping[Start, TokenDocument]
) -> dict[Start, TokenDocument]:
    """Those documents, from `at_hand` or read again, which is necessary only after a resume."""
    found = {}
    for source, cursor in documents_in_use(state):
        document = at_hand.get((source, cursor))
        if document is None:
            first, document = feeds[source].first(cursor)
            if first != cursor:
                raise ValueError(
                    f"source {feeds[source].source.name!r} has no document for training at {cursor}, which the mixture "
                    "state has started to read; were held_out_fraction or bad_documents changed?"
                )
        found[source, cursor] = document
    return found


Rows = list[list[Placed]]
Waiting = list[Drawn]


class OpenRows:
    """The space left in each row."""

    def __init__(self, rows: int, seq_len: int) -> None:
        self._spaces = [(seq_len, row) for row in range(rows)]  # sorted by space, then row

    @property
    def largest(self) -> int:
        """The largest space left in any row."""
        return self._spaces[-1][0]

    def place(self, length: int) -> int | None:
        """Reserve `length` tokens in a row and return the row; None if no row has space."""
        # The first row with enough space is the fullest of those that fit.
        found = bisect_left(self._spaces, (length, -1))
        if found == len(self._spaces):
            return None
        space, row = self._spaces.pop(found)
        insort(self._spaces, (space - length, row))
        return row


def best_fit(draws: Draws, pending: Iterable[Start], settings: DataSettings) -> tuple[Rows, Waiting]:
    """Rows, and the sequences that are left for the next batch."""
    rows: Rows = [[] for _ in range(settings.rows)]
    open_rows = OpenRows(settings.rows, settings.seq_len)
    waiting: Waiting = []

    def place(drawn: Drawn | None) -> None:
        assert drawn is not None, "a whole row takes at least one token"
        row = open_rows.place(len(drawn.sequence.ids_N))
        if row is None:
            waiting.append(drawn)
        else:
            rows[row].append(drawn.sequence)

    # Pending sequences go first, or a long document might wait forever.
    for start in pending:
        place(draws.again(start, settings.seq_len))
    # Sequences that fit nowhere are already recorded, so they must wait; `packing_window` limits their number.
    while open_rows.largest and len(waiting) < settings.packing_window:
        place(draws.next(settings.seq_len))
    return rows, waiting


def wrapped(draws: Draws, pending: Iterable[Start], settings: DataSettings) -> tuple[Rows, Waiting]:
    """Rows without gaps, except where a row's last position would hold only a BOS."""
    rows: Rows = [[] for _ in range(settings.rows)]
    for row in rows:
        space = settings.seq_len
        while space and (drawn := draws.next(space)) is not None:
            row.append(drawn.sequence)
            space -= len(drawn.sequence.ids_N)
    return rows, []


def one_each(draws: Draws, pending: Iterable[Start], settings: DataSettings) -> tuple[Rows, Waiting]:
    """One sequence per row."""
    drawn = [draws.next(settings.seq_len) for _ in range(settings.rows)]
    return [[d.sequence] for d in drawn if d is not None], []


MODES: dict[str, Callable[[Draws, Iterable[Start], DataSettings], tuple[Rows, Waiting]]] = {
    "best_fit": best_fit,
    "wrapped": wrapped,
    "none": one_each,
}
