"""Reads JSON lines that a run may still be writing. Called by `report`, `cli.export`, demos and benchmarks."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; one without a line break is still being written. Empty if there is no file."""
    if not path.is_file():
        return []
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole if line]
