"""How sequences share the rows of a batch: one function a mode. Called by `loader`.

best_fit: a document stays whole where it can (longer ones are cut every `seq_len` tokens) and goes to the row with the
least space that still takes it. One that fits nowhere waits, in the mixture state, for the next batch, where those
that have waited longest are placed first. wrapped: each row is filled to its last token and documents are cut there.
none: one sequence a row.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable

from student_trainer.batch.batch import Placed
from student_trainer.data.draw import Drawn, Draws, Start
from student_trainer.settings.data import DataSettings

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
        """The row that takes `length` tokens, or None."""
        # The first row whose space is no less: of all that take the sequence the fullest.
        found = bisect_left(self._spaces, (length, -1))
        if found == len(self._spaces):
            return None
        space, row = self._spaces.pop(found)
        insort(self._spaces, (space - length, row))
        return row


def best_fit(draws: Draws, pending: Iterable[Start], settings: DataSettings) -> tuple[Rows, Waiting]:
    """Rows, and the sequences that wait for the next batch."""
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

    # Those that waited go first, or a long document might wait for ever.
    for start in pending:
        place(draws.again(start, settings.seq_len))
    # What is drawn and fits nowhere is booked already: `packing_window` bounds how many may wait.
    while open_rows.largest and len(waiting) < settings.packing_window:
        place(draws.next(settings.seq_len))
    return rows, waiting


def wrapped(draws: Draws, pending: Iterable[Start], settings: DataSettings) -> tuple[Rows, Waiting]:
    """Rows without a gap, but where a row's last place would hold a BOS alone."""
    rows: Rows = [[] for _ in range(settings.rows)]
    for row in rows:
        space = settings.seq_len
        while space and (drawn := draws.next(space)) is not None:
            row.append(drawn.sequence)
            space -= len(drawn.sequence.ids_N)
    return rows, []


def one_each(draws: Draws, pending: Iterable[Start], settings: DataSettings) -> tuple[Rows, Waiting]:
    """One sequence a row."""
    drawn = [draws.next(settings.seq_len) for _ in range(settings.rows)]
    return [[d.sequence] for d in drawn if d is not None], []


MODES: dict[str, Callable[[Draws, Iterable[Start], DataSettings], tuple[Rows, Waiting]]] = {
    "best_fit": best_fit,
    "wrapped": wrapped,
    "none": one_each,
}
