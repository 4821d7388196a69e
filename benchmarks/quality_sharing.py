"""The table of sharing: four students with different losses on one teacher, compared with one teacher for each.

Made by `quality`, with real services and real trainers, each its own process. The teacher is SmolLM2-135M, each student
every fifth layer of it. Forward passes are the tokens that the teachers computed divided by the tokens of the data.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import httpx
import psutil

from benchmarks.quality_runs import ROOT, Size, alone
from benchmarks.seeded_results import Cell, Line, by_seed, interval, spread
from benchmarks.served_teacher import serve_teacher
from benchmarks.servers import END_WITH_ME
from demo.prepare import STUDENT, prepare

NAME = "sharing"
LOSSES = {
    "logits": ["distillation=logits_only"],
    "forward": alone("forward_kl"),
    "reverse": alone("reverse_kl"),
    "jsd": alone("jsd"),
}
TEACHERS = (1, len(LOSSES))
STEPS, SEQ_LEN = 8, 256


def about(size: Size) -> str:
    return f"SmolLM2-135M and four students of every fifth of its layers, {STEPS} steps of {SEQ_LEN} tokens"


def cells(size: Size, seeds: Sequence[int]) -> list[Cell]:
    """The same at every size, because the teacher has to dominate the cost."""
    return [
        {"arm": f"{teachers} teachers", "teachers": teachers, "seed": seed} for seed in seeds for teachers in TEACHERS
    ]


def make(size: Size, cell: Cell) -> Line:
    prepare(("teacher", "student", "text"))
    root = ROOT / "sharing"
    for name in LOSSES:  # runs of the previous cell, or of an interrupted one
        shutil.rmtree(root / name, ignore_errors=True)
    with ExitStack() as stack:
        urls = []
        for number in range(cell["teachers"]):
            (root / str(number)).mkdir(parents=True, exist_ok=True)
            urls.append(stack.enter_context(serve_teacher(root / str(number), "--dtype", "auto")))
        used = _teachers_cpu_s()
        began = time.monotonic()
        students = [
            _student(name, settings, urls[number % len(urls)], cell["seed"])
            for number, (name, settings) in enumerate(LOSSES.items())
        ]
        codes = [student.wait() for student in students]
        wall_s, used = time.monotonic() - began, _teachers_cpu_s() - used
        if any(codes):
            raise SystemExit(f"the students ended with codes {codes}: see {root}")
        computed = sum(httpx.get(f"{url}/v1/status").json()["sources"].get("engine", 0) for url in urls)
    return {"wall_s": wall_s, "teachers_cpu_s": used, "passes": computed / (STEPS * SEQ_LEN)}


def _student(name: str, settings: Sequence[str], url: str, seed: int) -> subprocess.Popen[bytes]:
    root = ROOT / "sharing"
    command = [
        sys.executable, "-m", "student_trainer.main", "--config-folder", "demo/config", "data=stdlib",
        f"data.seq_len={SEQ_LEN}", f"run.root={root}", f"run.id={name}", "run.resume=never", f"run.seed={seed}",
        f"run.steps={STEPS}", f"student.checkpoint_path={STUDENT}", f"teacher.url={url}", "evaluation.every=0",
        "checkpoint.every=0", "logging.wandb=off", "logging.progress=off", *settings,
    ]  # fmt: skip
    with (root / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | END_WITH_ME)


def _teachers_cpu_s() -> float:
    """User and system time of the services that this process has started."""
    services = [child for child in psutil.Process().children() if "teacher_service.main" in child.cmdline()]
    return sum(sum(service.cpu_times()[:2]) for service in services)


def rows(size: Size, lines: Sequence[Line]) -> list[dict[str, Any]]:
    found = {
        (teachers, figure): by_seed([line for line in lines if line["teachers"] == teachers], figure)
        for teachers in TEACHERS for figure in ("wall_s", "teachers_cpu_s", "passes")
    }  # fmt: skip
    made = []
    for teachers in TEACHERS:
        if not found[teachers, "passes"]:
            continue
        row: dict[str, Any] = {"teachers": teachers}
        for figure, name, digits in (
            ("passes", "forward passes", 2), ("teachers_cpu_s", "seconds of the teachers' CPU", 1),
            ("wall_s", "seconds until all have learnt", 0),
        ):  # fmt: skip
            ours, theirs = found[teachers, figure], found[TEACHERS[-1], figure]
            both = sorted(ours.keys() & theirs.keys())
            row[name] = spread(list(ours.values()), digits)
            row[f"{name}, of four teachers'"] = (
                "" if teachers == TEACHERS[-1] else interval([ours[seed] / theirs[seed] for seed in both], 2)
            )
        made.append(row | {"seeds": len(found[teachers, "passes"])})
    return made
