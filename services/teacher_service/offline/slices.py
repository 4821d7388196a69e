"""Which units of the data are this process's: `--slice I/N`. Read by `fill_options.py`, used by `dataset_fill.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """Every `of`-th unit, from the `number`-th, counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Slice:
        """`2/8`. ValueError for what is none."""
        number, _, of = text.partition("/")
        if not number.isdigit() or not of.isdigit() or not 1 <= int(number) <= int(of):
            raise ValueError(f"--slice {text}: I/N was expected, such as 1/8 to 8/8")
        return cls(int(number), int(of))

    def has(self, unit: int) -> bool:
        return unit % self.of == self.number - 1
