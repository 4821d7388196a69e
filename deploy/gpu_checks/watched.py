"""Runs a trainer with a thread that watches its steps: `python -m deploy.gpu_checks.watched FOUND SETTINGS...`.

Started by `step_speed`. After some steps the thread writes its findings to FOUND and ends the process without saving.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

# Steps 3 to 10 are timed. In four more, waits for the device are counted, which slows them a little.
WARM, TIMED, COUNTED = 2, 8, 4
LOOKS_EVERY_S = 0.01


def main() -> None:
    found, *arguments = sys.argv[1:]
    folder = next(Path(a.partition("=")[2]) for a in arguments if a.startswith("run.root=")) / "run"
    threading.Thread(target=_watch, args=(Path(found), folder), daemon=True).start()
    from student_trainer.main import main

    main(arguments)


def _watch(found: Path, folder: Path) -> None:
    try:
        _write(found, _watched(folder))
        code = 0
    except BaseException:  # the process ends with this thread in any case
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _watched(folder: Path) -> dict[str, Any]:
    _wait_for(folder, WARM)
    import torch
    from torch._dynamo.utils import counters

    def graphs() -> int:
        return int(counters["stats"]["unique_graphs"])

    warm = graphs()
    _wait_for(folder, WARM + TIMED)
    seen: dict[str, Any] = {"from": WARM, "until": WARM + TIMED, "waits": {}, "waited_steps": COUNTED}
    seen |= {"graphs": graphs(), "recompilations": graphs() - warm, "peak_bytes": 0}
    if torch.cuda.is_initialized():
        seen["peak_bytes"] = torch.cuda.max_memory_allocated()
        seen["waits"] = _waits(folder)
    return seen


def _waits(folder: Path) -> dict[str, int]:
    """Where in the code the trainer waited for the device in some steps, and how often."""
    import torch

    places: Counter[str] = Counter()

    def note(message: Any, category: type[Warning], filename: str, line: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            places[f"{filename.rpartition('/')[2]}:{line}"] += 1

    warnings.simplefilter("always")
    warnings.showwarning = note
    # From the end of one step to the end of another.
    _wait_for(folder, _steps(folder) + 1)
    torch.cuda.set_sync_debug_mode("warn")
    places.clear()
    _wait_for(folder, _steps(folder) + COUNTED)
    return dict(places)


def _steps(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def _wait_for(folder: Path, step: int) -> None:
    while _steps(folder) < step:
        time.sleep(LOOKS_EVERY_S)


def _write(found: Path, seen: dict[str, Any]) -> None:
    found.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
