"""Sequences drawn from the mixture one after another, cut to the space they are given. Used by `packing`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from student_trainer.batch.batch import Placed
from student_trainer.data.feed import Feed
from student_trainer.data.mixture import Cursor, Mixer, MixtureState
from student_trainer.data.tokenise import TokenDocument

Start = tuple[int, Cursor]  # a source, and where in it a sequence begins


@dataclass(frozen=True)
class Drawn:
    """A sequence that has no place yet."""

    start: Start
    sequence: Placed


def cut(source: int, name: str, document: TokenDocument, offset: int, space: int) -> Placed:
    """The prefix and as many of the document's tokens from `offset` on as `space` takes."""
    stop = min(len(document.ids_N), offset + space - len(document.prefix))
    assert stop > offset
    whole = offset == 0 and stop == len(document.ids_N)
    key = f"{name}:{document.index}" + ("" if whole else f":{offset}")
    prefix_N = np.array(document.prefix, np.int32)
    counts_N = None
    if document.counts_N is not None:
        # A prefix is given, not learnt.
        counts_N = np.concatenate([np.zeros(len(prefix_N), bool), document.counts_N[offset:stop]])
    return Placed(source, key, np.concatenate([prefix_N, document.ids_N[offset:stop]]), counts_N)


class Draws:
    """Draws by the mixture's rule, and books each draw with the mixer."""

    def __init__(self, mixer: Mixer, feeds: Sequence[Feed], documents: dict[Start, TokenDocument]) -> None:
        """documents: those at hand that the mixer's slots and the pending sequences are cut from."""
        self._mixer, self._feeds, self._documents = mixer, feeds, documents

    def next(self, space: int) -> Drawn | None:
        """The next sequence, of at most `space` tokens; None, and nothing booked, where not one token would fit."""
        source = self._mixer.next_source()
        cursor = self._mixer.cursor(source)
        slot = self._mixer.turn(source)
        if slot is None:
            first, document = self._feeds[source].first(cursor)
            # A document of the next epoch may not begin before this one's are read out.
            slot = self._mixer.unfinished(source, first.epoch)
        if slot is None:
            start, cursor = first, replace(first, document=first.document + 1)
            self._documents[source, start] = document
        else:
            start, document = slot, self._documents[source, replace(slot, offset=0)]
        # A prefix without a token behind it teaches nothing.
        if space <= len(document.prefix):
            return None
        sequence = cut(source, self._feeds[source].source.name, document, start.offset, space)
        stop = start.offset + len(sequence.ids_N) - len(document.prefix)
        rest = None if stop == len(document.ids_N) else replace(start, offset=stop)
        self._mixer.drawn(source, len(sequence.ids_N), cursor, slot, rest)
        return Drawn((source, start), sequence)

    def again(self, start: Start, space: int) -> Drawn:
        """A sequence that was drawn before and waited; it is booked already."""
        source, cursor = start
        document = self._documents[source, replace(cursor, offset=0)]
        return Drawn(start, cut(source, self._feeds[source].source.name, document, cursor.offset, space))


def documents_in_use(state: MixtureState) -> list[Start]:
    """The documents that are partly read or pending, by source and in the order of the source."""
    open_slots = [(i, slot) for i, source in enumerate(state.sources) for slot in source.slots if slot]
    return sorted({(i, replace(cursor, offset=0)) for i, cursor in (*open_slots, *state.pending)})


def fetch_in_use(
    state: MixtureState, feeds: Sequence[Feed], at_hand: Mapping[Start, TokenDocument]
) -> dict[Start, TokenDocument]:
    """Those documents, from `at_hand` or read anew, which happens once, after a resume."""
    found = {}
    for source, cursor in documents_in_use(state):
        document = at_hand.get((source, cursor))
        if document is None:
            first, document = feeds[source].first(cursor)
            if first != cursor:
                raise ValueError(
                    f"source {feeds[source].source.name!r} has no document for training at {cursor}, which the mixture "
                    "state has begun; were held_out_fraction or bad_documents changed?"
                )
        found[source, cursor] = document
    return found
