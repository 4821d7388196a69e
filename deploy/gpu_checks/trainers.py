"""Starts trainers as processes, and reads their metrics. Used by `step`, `resume` and `step_speed`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploy.gpu_checks.report import Options

# Times, which differ even between identical runs.
TIMES = ("time", "seconds", "tokens_per_second", "wait_s", "wait_share", "prefetch_depth")


def settings(options: Options, folder: Path, student: Path, teacher: Path, *more: str) -> list[str]:
    """The command line of a run in `folder`/run, whose teacher is a model in the trainer's process."""
    return [
        f"student.checkpoint_path={student}", "teacher.kind=local", f"teacher.model={teacher}",
        f"teacher.device={options.device}", "teacher.dtype=float32", "teacher.top_k=16", "teacher.sanity=off",
        f"run.device={options.device}", f"run.root={folder}", "run.id=run", "data.workers=1",
        f"data.cache_folder={folder / 'cache'}", "data.sources.text.kind=jsonl", "data.sources.text.format=tokens",
        "evaluation.every=0", "logging.wandb=off", "logging.progress=off", *more,
    ]  # fmt: skip


def start(arguments: list[str], output: Path, module: str = "student_trainer.main") -> subprocess.Popen[bytes]:
    """Start a trainer in this section's process group, with which it ends."""
    environment = os.environ | {"STILLHOUSE_DIE_WITH_PARENT": "1"}
    with output.open("ab") as file:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for its end. RuntimeError with the end of its output if it failed."""
    if process.wait():
        raise RuntimeError(
            f"a trainer ended with code {process.returncode}:\n{output.read_text(errors='replace')[-3000:]}"
        )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics so far."""
    file = folder / "run" / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def trace(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(folder)]


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Wait until that step is made, or the process has ended."""
    while process.poll() is None and len(metrics(folder)) < step:
        time.sleep(0.02)
