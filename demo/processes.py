"""Services and trainers as processes of their own, for the demos: `run` and `bitdistill`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from demo.prepare import prepare

BIN = Path(sys.executable).parent
READY_WITHIN_S = 600.0
# Services and student share the cores here: a thread that waits for another must not spin.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", **os.environ}


def prepare_with_progress(console: Console) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("prepare", total=None)
        prepare(lambda what, done, total: progress.update(task, description=what, completed=done, total=total))


@contextmanager
def serve(console: Console, name: str, arguments: list[str], log_file: Path) -> Iterator[str]:
    """The service `name` on a free port: its URL when it is ready; ended when the block is left."""
    command = [str(BIN / name), *arguments, "--port", "0"]
    console.print(f"[dim]$ {' '.join(command)}[/]")
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    try:
        with console.status(f"{name} loads its model"):
            url = _wait_ready(process, name, log_file)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_ready(process: subprocess.Popen[bytes], name: str, log_file: Path) -> str:
    """The URL that the service says it is ready at. SystemExit with the end of its log if it never does."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        log = log_file.read_text(errors="replace")
        if ready := re.search(rf"^{name}: ready at (\S+),", log, re.MULTILINE):
            return ready[1]
        if process.poll() is not None:
            tail = "\n".join(log.splitlines()[-15:])
            raise SystemExit(f"{name} ended with code {process.returncode}; {log_file} ends with:\n{tail}")
        time.sleep(0.25)
    raise SystemExit(f"{name} was not ready within {READY_WITHIN_S:.0f} s; see {log_file}")


def trainer(*arguments: str) -> None:
    """`stillhouse-train ARGUMENTS`, as a user would run it. SystemExit if it fails."""
    with subprocess.Popen([str(BIN / "stillhouse-train"), *arguments], env=ENVIRONMENT) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code:
        raise SystemExit(f"stillhouse-train ended with code {code}: {' '.join(arguments)}")
