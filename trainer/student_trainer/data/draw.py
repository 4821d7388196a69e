"""Sequences drawn from the mixture one after another, cut to the space they are given. Used by `packing`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from student_trainer.data.batch import Placed
from student_trainer.data.feed import Feed
from student_trainer.data.mixture import Cursor, Mixer
from student_trainer.data.tokenise import TokenDocument

Start = tuple[int, Cursor]  # a source, and where in it a sequence begins


@dataclass(frozen=True)
class Drawn:
    """A sequence that has no place yet."""

    start: Start
    document: TokenDocument
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
        counts_N = np.concatenate([np.zeros(len(prefix_N), bool), document.counts_N[offset:stop]])
    return Placed(source, key, np.concatenate([prefix_N, document.ids_N[offset:stop]]), counts_N)


class Draws:
    """Draws by the mixture's rule and books each draw with the mixer."""

    def __init__(self, mixer: Mixer, feeds: Sequence[Feed], kept: Mapping[Start, TokenDocument]) -> None:
        """kept: documents of pending sequences that are still at hand; the others are fetched anew."""
        self._mixer, self._feeds, self._kept = mixer, feeds, kept

    def next(self, space: int) -> Drawn | None:
        """The next sequence, of at most `space` tokens; None where its first token would not fit."""
        source = self._mixer.next_source()
        feed = self._feeds[source]
        start, document = feed.first(self._mixer.cursor(source))
        if space <= len(document.prefix):
            return None
        sequence = cut(source, feed.source.name, document, start.offset, space)
        stop = start.offset + len(sequence.ids_N) - len(document.prefix)
        ended = stop == len(document.ids_N)
        after = replace(start, document=start.document + 1, offset=0) if ended else replace(start, offset=stop)
        self._mixer.drawn(source, len(sequence.ids_N), after)
        return Drawn((source, start), document, sequence)

    def again(self, start: Start, space: int) -> Drawn:
        """A sequence that was drawn before and waited; it is booked already."""
        source, cursor = start
        document = self._kept.get(start)
        if document is None:
            found, document = self._feeds[source].first(cursor)
            assert found == cursor, "a pending sequence began at a document for training"
        return Drawn(start, document, cut(source, self._feeds[source].source.name, document, cursor.offset, space))
