"""How tests are shared out among the workers of pytest-xdist: how many there are, what comes first, and whose ports are
whose. Called by `conftest.py` and `teacher_process.py`.

A worker is a process with fixtures of its own. All tests of a file go to one worker (`--dist loadfile`), so that what
they share is made once; the files that take longest begin first, so that the workers end together.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

# What a worker holds at most: vLLM over the demo's model, beside that model in transformers.
GIB_A_WORKER = 3
# Every worker collects all tests and makes session fixtures of its own, which more of them don't make up for.
MOST_WORKERS = 8
PORTS = range(20_000, 32_000)  # below those that the kernel gives away by itself, from 32,768 on
# Folders of tests with the longest files first; a folder that is not here comes with the rest, in the end.
LONGEST_FIRST = ("docs", "contract", "e2e", "chaos", "fuzz", "deploy", "property")


def worker_count() -> int:
    """One worker a core that this process may use, fewer where memory is short."""
    return max(1, min(_cores(), int(_memory() / 2**30 / GIB_A_WORKER), MOST_WORKERS))


def ports_of_this_worker() -> range:
    """The ports that tests of this process may take: no two workers have one in common."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = max(number + 1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    share = len(PORTS) // count
    return PORTS[number * share : (number + 1) * share]


def longest_first(items: list[pytest.Item], tests: Path) -> None:
    """Sort `items` by the folder of `tests` that they are in; within a folder they stay as they are."""
    items.sort(key=lambda item: _place(item.path.relative_to(tests)) if item.path.is_relative_to(tests) else 0)


def _place(path: Path) -> int:
    return LONGEST_FIRST.index(path.parts[0]) if path.parts[0] in LONGEST_FIRST else len(LONGEST_FIRST)


def cgroup_limit(name: str, folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    """A container's limit (cgroup v2): of `cpu.max` in cores, of `memory.max` in bytes; None where there is none."""
    path = folder / name
    words = path.read_text().split() if path.is_file() else ["max"]
    if words[0] == "max":
        return None
    return int(words[0]) / int(words[1]) if len(words) > 1 else float(words[0])


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, max(1, int(cgroup_limit("cpu.max") or allowed)))


def _memory() -> float:
    total = float(psutil.virtual_memory().total)
    return min(total, cgroup_limit("memory.max") or total)
