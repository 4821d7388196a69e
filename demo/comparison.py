"""What comparisons made run by run have in common: options, progress, the plan that is kept, and Markdown tables.
Called by `diffusion` and `classification`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from student_trainer.reporting.json_lines import read_lines


def options_of(name: str, about: str, minutes: float) -> argparse.ArgumentParser:
    """The options of every comparison, which continues where it was stopped unless --again is given."""
    parser = argparse.ArgumentParser(prog=f"python -m demo.{name}", description=about.split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="for the whole comparison (default: %(default)g)"
    )
    parser.add_argument("--again", action="store_true", help="start over instead of continuing")
    parser.add_argument("--steps", type=int, help="of each run (default: as many as fit in the time)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="make only this many runs now (default: all)")
    return parser


def finished(run: Path, steps: int) -> bool:
    """Whether the run was evaluated after its last step."""
    lines = read_lines(run / "evaluation.jsonl")
    return bool(lines) and lines[-1]["step"] == steps


def progress_of(run: Path, steps: int) -> Callable[[], str]:
    return lambda: f"step {len(read_lines(run / 'metrics.jsonl'))} of {steps}"


def kept_plan(file: Path) -> dict[str, Any] | None:
    """The plan that was made when the comparison began, or None."""
    return json.loads(file.read_text()) if file.is_file() else None


def keep_plan(file: Path, plan: dict[str, Any]) -> None:
    file.write_text(json.dumps(plan, indent=2))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows with the same columns."""
    columns = list(rows[0])
    return markdown_table([columns, *([str(row[column]) for column in columns] for row in rows)])


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """The first line is the header; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(line) + " |" for line in table]
    lines.insert(1, "| --- |" + " ---: |" * (len(table[0]) - 1))
    return "\n".join(lines)
