"""Finds and ends the descendants of a process: its children, and theirs. Called by `stopping`.

Reads Linux's /proc; finds none where there is no /proc.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_STATE, _PARENT, _STARTED = 0, 1, 19  # fields of /proc/PID/stat after the name


def descendants(root: int) -> dict[int, str]:
    """Process ids and start times of the descendants of `root`. A pid alone may be reused; the pair is unique."""
    parents: dict[int, int] = {}
    started: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(folder.name))) is not None:
            parents[int(folder.name)] = int(fields[_PARENT])
            started[int(folder.name)] = fields[_STARTED]
    found: dict[int, str] = {}
    level = {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level and pid not in found}
        found |= {pid: started[pid] for pid in level}
    return found


def end(processes: dict[int, str], within_s: float = 0.5) -> None:
    """Kill those of `processes` that still run, and wait at most `within_s` seconds until they are gone."""
    deadline = time.monotonic() + within_s
    while (left := [pid for pid, started in processes.items() if _runs(pid, started)]) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _runs(pid: int, started: str) -> bool:
    fields = _stat(pid)
    return fields is not None and fields[_STARTED] == started


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may contain anything; None if the process has ended, reaped or
    not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[_STATE] in "ZX" else fields
