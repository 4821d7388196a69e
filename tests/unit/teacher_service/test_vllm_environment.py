"""How vLLM is set up before it is imported: in a process of its own, and without a question to any device.

A vLLM of a few lines stands in for the real one, and writes down what it finds when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAKE = """
import json, os, sys
asked = []
if "torch" in sys.modules:
    import torch
    asked = ["torch is here"] + (["CUDA is initialised"] if torch.cuda.is_initialized() else [])
names = ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")
with open(os.environ["RECORD"], "w") as file:
    json.dump({"before": asked, "pid": os.getpid(), **{name: os.environ.get(name) for name in names}}, file)
raise RuntimeError("this is no vLLM")
"""
START = """
import asyncio, os, sys
if __name__ == "__main__":
    from teacher_service.engines.vllm_engine import VllmEngine
    print(os.getpid(), flush=True)
    try:
        asyncio.run(VllmEngine(sys.argv[1]).start())
    except ValueError as error:
        print(error)
    print("vllm" in sys.modules, "VLLM_WORKER_MULTIPROC_METHOD" in os.environ)
"""


def start(tmp_path: Path, model: Path, version: str, **environment: str) -> tuple[list[str], dict[str, Any]]:
    """What the service's side prints, and what the vLLM that it is led to writes down."""
    packages = tmp_path / "packages"
    (packages / "vllm").mkdir(parents=True)
    (packages / "vllm" / "__init__.py").write_text(FAKE)
    about = packages / f"vllm-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (tmp_path / "start.py").write_text(START)
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("VLLM_", "OMP_"))}
    paths = [str(packages), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "start.py"), str(model)], capture_output=True, text=True, check=False,
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths), "RECORD": str(tmp_path / "record")} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), json.loads((tmp_path / "record").read_text())


@pytest.mark.parametrize(("version", "threads"), [("0.32.0", None), ("0.32.0+cpu", "cores")])
def test_no_device_is_asked_for_before_vllm_is_imported(
    tmp_path: Path, tiny_llama: Path, version: str, threads: str | None
) -> None:
    (pid, *_, said, state), record = start(tmp_path, tiny_llama, version)
    assert said.startswith("vLLM cannot serve tiny-llama: this is no vLLM")
    assert record["before"] == [], "nor is torch imported: the number of its threads is settled when it is"
    assert record["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn" and record["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert record["OMP_NUM_THREADS"] == (threads and str(len(os.sched_getaffinity(0))))
    assert record["pid"] != int(pid) and state == "False False", "the service's own process has nothing of it"


def test_what_the_user_has_set_stays(tmp_path: Path, tiny_llama: Path) -> None:
    _, record = start(tmp_path, tiny_llama, "0.32.0", VLLM_WORKER_MULTIPROC_METHOD="fork", OMP_NUM_THREADS="3")
    assert record["VLLM_WORKER_MULTIPROC_METHOD"] == "fork" and record["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("versions", "target", "on_cpu"),
    [
        ({"vllm": "0.32.0"}, "", False),
        ({"vllm": "0.32.0+cpu"}, "", True),
        ({}, "", True),
        ({"vllm": "0.32.0"}, "cpu", True),
    ],
)
def test_which_vllm_is_installed_says_where_it_computes(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], target: str, on_cpu: bool
) -> None:
    from importlib import metadata

    from teacher_service.engines import vllm_options

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("VLLM_TARGET_DEVICE", target)
    assert vllm_options.built_for_cpu() is on_cpu
