"""Files of JSON lines that a run writes, read while it may still be writing. Called by `report`, and by the demos."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: one without a line break at its end is being written. None where there is no file."""
    if not path.is_file():
        return []
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole if line]
