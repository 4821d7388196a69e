"""What a student retains of its teacher, by loss, temperature, codec, staleness and sharing: docs/quality.md.

    make quality                                          small models trained here; half an hour of one core
    python -m benchmarks.quality --minutes 6              starts no run after that time; the next call continues
    python -m benchmarks.quality --table temperature --docs        one table, written into docs/quality.md
    python -m benchmarks.quality --size smollm2           layers of SmolLM2-135M, 100,000 tokens a run; days of one core

Each run is a line of benchmarks/results/quality.jsonl, and finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks import quality_codec, quality_losses, quality_sharing, quality_staleness, quality_temperature
from benchmarks.quality_runs import ROOT, SIZES, Size
from benchmarks.report import publish, report
from benchmarks.seeded_results import Line, Results
from demo.comparison import markdown

RESULTS, DOCS = Path("benchmarks/results/quality.jsonl"), Path("docs/quality.md")
# Each module has NAME, which its marker in the page begins with, about(size), cells(size, seeds),
# make(size, cell) and rows(size, lines).
TABLES = {
    table.NAME: table
    for table in (quality_losses, quality_temperature, quality_codec, quality_staleness, quality_sharing)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, nargs="+", default=list(TABLES))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many minutes")
    parser.add_argument("--seeds", type=int, nargs="+", help="choice and order of the texts; default: the size's")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/quality.md")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    size = SIZES[options.size]
    (ROOT / size.name).mkdir(parents=True, exist_ok=True)
    results = Results(RESULTS)
    cells = [
        {"table": name, "size": size.name, **cell}
        for name in options.table
        for cell in TABLES[name].cells(size, options.seeds or size.seeds)
    ]
    left = results.make_missing(cells, lambda cell: TABLES[cell["table"]].make(size, cell), deadline)
    for name in options.table:
        if results.lines({"table": name, "size": size.name}):
            write(name, size, results, options.docs)
    if left:
        print(f"{left} runs left: start it again to continue")
    return 0


def write(name: str, size: Size, results: Results, docs: bool) -> None:
    lines = results.lines({"table": name, "size": size.name})
    rows = TABLES[name].rows(size, lines)
    title = title_of(TABLES[name].about(size), lines)
    report(f"quality_{name}", rows, title=title, notes=(f"one line per run: {RESULTS}",))
    if docs:
        publish(DOCS, f"{title}:\n\n{markdown(rows)}", name)


def title_of(about: str, lines: list[Line]) -> str:
    """`about`, with the time that the runs took: processor time, or wall time if services and trainers were separate
    processes, whose processor time was not measured.
    """
    apart = all("wall_s" in line for line in lines)
    minutes = sum(line["wall_s" if apart else "cpu_s"] for line in lines) / 60
    cpu = ", ".join(sorted({line["cpu"] for line in lines}))
    took = f"{minutes:.0f} minute{'' if round(minutes) == 1 else 's'} of {'wall' if apart else 'CPU'} time"
    return f"{about}; {len(lines)} runs, {took} ({cpu}), with other work on the machine"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
