"""Texts of progress: durations for people, and lines and bars cut to the width of a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

LEAST_BAR, GAP = 8, 2


def shortened(text: str, width: int) -> Text:
    """One row of text; an ellipsis replaces what does not fit."""
    from rich.text import Text

    row = Text(text, no_wrap=True)
    row.truncate(width, overflow="ellipsis")
    return row


def bar_line(width: int, what: str, done: float, total: float | None, right: Sequence[str]) -> Any:
    """A row of `what`, a bar that fills the remaining width, and the texts of `right`, of which the first are dropped
    in a narrow terminal. Without a `total` there is no bar.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    texts = [text for text in right if text]
    least = LEAST_BAR + GAP if total else 0
    while len(texts) > 1 and len(what) + least + sum(GAP + len(text) for text in texts) > width:
        texts.pop(0)
    taken = len(what) + sum(GAP + len(text) for text in texts)
    cells: list[Any] = [shortened(what, max(1, width - taken + len(what)))]
    if total and width - taken >= least:
        cells.append(ProgressBar(total=total, completed=min(done, total), width=width - taken - GAP))
    cells += [shortened(text, width) for text in texts]
    row = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    for _ in cells:
        row.add_column(no_wrap=True)
    row.add_row(*cells)
    return row


def duration(seconds: float) -> str:
    """Seconds for people: `45 s`, `3 min 9 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
