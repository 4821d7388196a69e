"""Writes a section's findings line by line to a file, and the card of all sections. Used by `run` and every section."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """`device`: cpu or cuda. `tiny`: shapes small enough for a CPU. `folder`: for the section's files."""

    device: str
    tiny: bool
    folder: Path


class Report:
    """Every line is on disk when the call returns, so a section that crashes or is killed keeps its findings."""

    def __init__(self, path: Path):
        self._file = path.open("a", buffering=1)

    def check(self, what: str, passed: bool, said: str = "") -> None:
        """A check of correctness."""
        self._write(check=what, passed=bool(passed), said=said)

    def close(self, what: str, error: float, bound: float) -> None:
        """A check of correctness: an error that must not exceed its bound, nor be NaN."""
        self.check(what, error <= bound, f"error {error:.2g}, bound {bound:.2g}")

    def figure(self, what: str, value: float, unit: str, aim: str = "") -> None:
        """A measured number; `aim` says what it should be. It cannot fail the section."""
        self._write(figure=what, value=value if math.isfinite(value) else None, unit=unit, aim=aim)

    def note(self, text: str) -> None:
        self._write(note=text)

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")


@dataclass
class Findings:
    """The findings of one section. `state`: passed, failed, crashed, out of time, or left out."""

    name: str
    counts: bool  # whether it checks correctness, and so affects the exit code
    state: str = "left out"
    seconds: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.counts and self.state not in ("passed", "left out")

    def settle(self, exit_code: int | None) -> None:
        """Set the state from the exit code of the section's process; None if it was killed at the end of its budget."""
        if exit_code is None:
            self.state = "out of time"
        elif exit_code < 0:
            self.state = "crashed"
            self.lines.append({"note": f"killed by signal {-exit_code}"})
        elif exit_code or any(line.get("passed") is False for line in self.lines):
            self.state = "failed"
        else:
            self.state = "passed" if any("note" not in line for line in self.lines) else "left out"

    def to_json(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "seconds": round(self.seconds, 1),
            "checks": [line for line in self.lines if "check" in line],
            "figures": [line for line in self.lines if "figure" in line],
            "notes": [line["note"] for line in self.lines if "note" in line],
        }


def text_of(line: dict[str, Any]) -> str:
    """A finding as it is printed."""
    if "check" in line:
        said = f" ({line['said']})" if line["said"] else ""
        return f"  {'ok   ' if line['passed'] else 'FAIL '} {line['check']}{said}"
    if "figure" in line:
        value = "none" if line["value"] is None else f"{line['value']:,.4g}"
        return f"  {value:>10} {line['unit']}  {line['figure']}{'  aim: ' + line['aim'] if line['aim'] else ''}"
    return f"  {line['note']}"


def write_card(path: Path, about: dict[str, Any], sections: list[Findings]) -> None:
    """Replace the card by one with all findings so far."""
    card = {
        **about,
        "correct": not any(section.wrong for section in sections),
        "sections": {section.name: section.to_json() for section in sections},
    }
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(card, indent=1) + "\n")
    fresh.replace(path)
