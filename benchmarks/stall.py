"""Share of a run's time spent waiting for its teacher, by the teacher's latency and the prefetch depth.

    make bench-stall

The trainer, with its real loop, runs in this process, and the teacher service in another, with the scripted engine,
whose responses cost little and arrive after a set latency. Latencies are multiples of the step time, which is measured
first. The baseline is depth 0: targets are requested in the step that needs them, which waits, as in trainers that call
a server inside the step (TRL's among them).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import report
from tests.models import save_tiny_llama
from tests.teacher_process import TeacherProcess
from tests.trainer_run import TOKENS, teacher_script

LATENCIES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
DEPTHS = ("0", "1", "2", "4", "auto")
ALLOWED = 0.02
ROWS, LENGTH = 2, 512


def main() -> None:
    arguments = _arguments()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.steps, arguments.warm_up)
        with served(0.0) as url:
            calibration = bench.run(url, "4")
        step_s = statistics.median(line["seconds"] - line["wait_s"] for line in calibration)
        rows = []
        latencies, depths = ((0.0, 1.0), ("0", "2")) if arguments.quick else (LATENCIES, DEPTHS)
        for multiple in latencies:
            trip = 1.0
            for depth in depths:
                # A new service for every run, because responses that it has cached arrive without the latency.
                with served(multiple * step_s) as url:
                    lines = bench.run(url, depth)
                rows.append(row_of(multiple, depth, step_s, trip, lines))
                if depth == "0":
                    trip = rows[-1]["waited"] / (1 - rows[-1]["waited"])
                print(rows[-1], file=sys.stderr)
    covered = [row for row in rows if row["covered"] == "yes"]
    report(
        "stall",
        [table_row(multiple, [row for row in rows if row["latency"] == multiple]) for multiple in latencies],
        {
            "step time without waiting, s": step_s,
            "largest share waited where depth x step time covers the latency": max(row["waited"] for row in covered),
            "cells above 2 % of those": sum(row["waited"] > ALLOWED for row in covered),
            "least speed where it is covered, of the most possible": min(
                row["of the most possible"] for row in covered
            ),
            "share waited with depth 0 by latency": {
                f"{r['latency']:g}": r["waited"] for r in rows if r["depth"] == "0"
            },
        },
        title=f"% of time spent waiting, by latency in step times ({arguments.steps} steps after {arguments.warm_up})",
        notes=[
            "the time to compute and send a response comes on top of the injected latency",
            "covered: the depth is at least 1, and at least the round trip that depth 0 waited for; auto always is",
        ],
    )


def table_row(multiple: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    shares = {f"depth {row['depth']}": 100 * row["waited"] for row in rows}
    return {"latency": multiple, **shares, "auto settled at": rows[-1]["depth at the end"]}


def row_of(multiple: float, depth: str, step_s: float, trip: float, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """`trip` is the duration of a fetch in step times."""
    seconds, waited = (sum(line[name] for line in lines) for name in ("seconds", "wait_s"))
    covers = depth == "auto" or int(depth) >= max(trip, 1)
    return {
        "latency": multiple,
        "depth": depth,
        "waited": waited / seconds,
        "steps a second": len(lines) / seconds,
        "of the most possible": len(lines) / seconds * step_s,
        "depth at the end": lines[-1]["prefetch_depth"],
        "covered": "yes" if covers else "no",
    }


@contextmanager
def served(latency_s: float) -> Iterator[str]:
    with TeacherProcess(script=teacher_script(delay_s=latency_s)) as teacher:
        yield teacher.url


class Bench:
    """Runs of `steps` steps after `warm_up` more, with a student and text under `folder`."""

    def __init__(self, folder: Path, steps: int, warm_up: int):
        self._folder, self._steps, self._warm_up = folder, steps, warm_up
        self._student = save_tiny_llama(folder / "student", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
        draw = np.random.default_rng(0)
        with (folder / "text.jsonl").open("w") as file:
            for _ in range(400):
                file.write(json.dumps({"input_ids": draw.integers(2, TOKENS, LENGTH - 1).tolist()}) + "\n")
        self._runs = 0

    def run(self, url: str, depth: str) -> list[dict[str, Any]]:
        """Make a run; returns its lines of metrics.jsonl after the warm-up."""
        from student_trainer import loop
        from student_trainer.build import build
        from student_trainer.cli.compose import compose
        from teacher_proto.process.stopping import StopSignals

        self._runs += 1
        settings = compose([
            f"student.checkpoint_path={self._student}", f"run.root={self._folder}", f"run.id=run{self._runs}",
            f"run.steps={self._steps + self._warm_up}", "run.threads=1", f"data.seq_len={LENGTH}", f"data.rows={ROWS}",
            "data.sources.a.kind=jsonl", "data.sources.a.format=tokens",
            f"data.sources.a.path={self._folder / 'text.jsonl'}", "data.sources.a.held_out_fraction=0",
            f"data.cache_folder={self._folder / 'cache'}", f"teacher.url={url}", "teacher.sanity=off",
            "teacher.top_k=16", f"prefetch.depth={depth}", "evaluation.every=0", "checkpoint.every=0",
            "logging.wandb=off", "logging.progress=off",
        ])  # fmt: skip
        with ExitStack() as stack:
            loop.train(build(settings, StopSignals(), stack))
        lines = (self._folder / f"run{self._runs}" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines][self._warm_up :]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two latencies and two depths, to try it out")
    parser.add_argument("--steps", type=int, default=30, help="steps measured per run")
    parser.add_argument("--warm-up", type=int, default=12, help="steps before them, in which depth auto settles")
    return parser.parse_args()


if __name__ == "__main__":
    main()
