"""The fenced blocks of a Markdown page, with the marks that say how the test of documentation treats them.

Used by `test_documentation.py`. CONTRIBUTING.md tells writers of pages what the marks are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXECUTED = ("sh", "python")
NEEDS = ("gpu", "network", "docker", "hub")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (needs|tested|serves|fails|continues|as-written)(?:: (.*?))? -->\s*\Z")
_SLOW = re.compile(r"^<!-- slow -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block. `marks` maps a mark's name to what follows its colon; `prints` is the `text` block below it."""

    page: str
    line: int
    language: str
    text: str
    marks: dict[str, str]
    prints: str | None

    @property
    def executed(self) -> bool:
        return self.language in EXECUTED and "needs" not in self.marks and "tested" not in self.marks

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    blocks = []
    for number, match in enumerate(found):
        following = found[number + 1] if number + 1 < len(found) else None
        answered = following is not None and following["language"] == "text" and not text[
            match.end() : following.start()
        ].strip()  # fmt: skip
        blocks.append(Block(
            page=str(path.relative_to(ROOT)),
            line=text.count("\n", 0, match.start()) + 1,
            language=match["language"],
            text=_dedented(match["text"], match["indent"]),
            marks=_marks_before(text[: match.start()]),
            prints=_dedented(following["text"], following["indent"]) if answered and following else None,
        ))  # fmt: skip
    return blocks


def is_slow(path: Path) -> bool:
    """Whether the page says `<!-- slow -->`, on a line of its own."""
    return bool(_SLOW.search(path.read_text(encoding="utf-8")))


def _marks_before(text: str) -> dict[str, str]:
    """The marks right above a fence, however many there are."""
    marks: dict[str, str] = {}
    while match := _MARK.search(text):
        marks[match[1]] = match[2] or ""
        text = text[: match.start()]
    return marks


def _dedented(text: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
