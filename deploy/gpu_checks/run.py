"""Runs the sections one after another, each in its own process group with a time budget. Called by `__main__`."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deploy.gpu_checks.report import Findings, Options, Report, text_of, write_card

PACKAGES = ("torch", "triton", "transformers", "vllm", "liger-kernel", "safetensors", "numpy")
# Imported once, in the process from which the sections are forked. None of them touches the GPU at import.
PRELOADED = ["torch", "transformers", "transformers.models.qwen3", "numpy"]
EVERY_S = 0.1


@dataclass(frozen=True)
class Section:
    """`module` has `function`(report, options); if it begins with a dot, it is in this package. `counts`: it checks
    correctness.
    """

    name: str
    about: str
    module: str
    budget_s: int
    counts: bool = True
    function: str = "run"


SECTIONS = (
    Section("reduction", "teacher's logits to records, against float64 on the CPU", ".reduction", 35),
    Section("head", "fused head and losses, values and gradients, against float64 on the CPU", ".head", 70),
    Section("step", "the trainer's steps with flex attention against SDPA", ".step", 60),
    Section("resume", "a killed and resumed run against an undisturbed one, bit for bit", ".resume", 65),
    Section("teacher", "the teacher over HTTP against transformers", ".serving", 40, function="teacher"),
    Section("attention", "the attention service over HTTP against transformers", ".serving", 35, function="attention"),
    Section("vllm", "the teacher with the vLLM engine, if it is installed", ".serving", 110, function="vllm"),
    Section("reduction_speed", "the reduction's time", ".reduction", 15, counts=False, function="speed"),
    Section("head_speed", "the fused head's time and memory, Liger's, cross-entropy's", ".head_speed", 50, False),
    Section("step_0.6B", "speed and memory of a training step, Qwen3 0.6B", ".step_speed", 90, False, "small"),
    Section("step_1.7B", "the same for Qwen3 1.7B", ".step_speed", 90, False, "large"),
)  # fmt: skip


def run_sections(names: list[str], device: str, folder: Path, seconds: float) -> int:
    """Returns the exit code. ValueError if there is no such device."""
    about = machine(device)
    shutil.rmtree(folder / "sections", ignore_errors=True)
    (folder / "sections").mkdir(parents=True)
    print(f"{about['device']}, torch {about['packages'].get('torch')}, {about['when']}", flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    chosen = [section for section in SECTIONS if section.name in names]
    findings = [Findings(section.name, section.counts) for section in chosen]
    end = time.monotonic() + seconds
    for section, found in zip(chosen, findings, strict=True):
        print(f"{section.name}: {section.about}", flush=True)
        left = end - time.monotonic()
        if left < 5:
            found.lines.append({"note": "no time left to run it"})
            found.state = "out of time"
            print("  no time left to run it", flush=True)
        else:
            options = Options(device, device == "cpu", folder / "sections" / section.name)
            # A CPU that others use too may be slow without hanging.
            _run(context, section, options, found, min(left, section.budget_s * (4 if options.tiny else 1)))
        print(f"  {section.name}: {found.state}, {found.seconds:.1f} s", flush=True)
        write_card(folder / "CARD.json", about, findings)
    wrong = [found.name for found in findings if found.wrong]
    print(f"not correct: {', '.join(wrong)}" if wrong else "correct", f"· {folder / 'CARD.json'}", flush=True)
    return 1 if wrong else 0


def _run(context: Any, section: Section, options: Options, found: Findings, budget_s: float) -> None:
    options.folder.mkdir()
    lines = options.folder / "lines.jsonl"
    lines.touch()
    began = time.monotonic()
    process = context.Process(target=_child, args=(section, options, lines))
    process.start()
    with lines.open() as reader:
        while process.is_alive() and time.monotonic() - began < budget_s:
            process.join(EVERY_S)
            _take(reader, found)
        late = process.is_alive()
        # Its whole process group, with the services and trainers that it started.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        _take(reader, found)
    found.seconds = time.monotonic() - began
    found.settle(None if late else process.exitcode)
    if late:
        found.lines.append({"note": f"stopped at its time limit of {budget_s:.0f} s"})
    if found.state in ("failed", "crashed", "out of time"):
        print(f"  output: {options.folder / 'output.txt'}", flush=True)
        for line in (options.folder / "output.txt").read_text(errors="replace").splitlines()[-12:]:
            print(f"    {line}", flush=True)


def _take(reader: Any, found: Findings) -> None:
    """Read the complete new lines of a section, keep and print them."""
    while True:
        at = reader.tell()
        text = reader.readline()
        if not text.endswith("\n"):
            reader.seek(at)
            return
        line = json.loads(text)
        found.lines.append(line)
        print(text_of(line), flush=True)


def _child(section: Section, options: Options, lines: Path) -> None:
    os.setsid()
    with (options.folder / "output.txt").open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        getattr(import_module(section.module, "deploy.gpu_checks"), section.function)(Report(lines), options)
    except Exception as error:  # the edge of the process
        traceback.print_exc()
        Report(lines).note(f"failed with {type(error).__name__}: {str(error).strip()[:500]}")
        sys.exit(1)


def machine(device: str) -> dict[str, Any]:
    """What the card says about this machine. ValueError if `device` is cuda and there is no CUDA device.

    Queried in a separate process: one that has used the GPU cannot be forked.
    """
    program = "import json, torch; from teacher_proto.hardware import cpu_name; print(json.dumps([cpu_name()] + ("
    program += "[torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, torch.version.cuda, "
    program += "list(torch.cuda.get_device_capability())] if torch.cuda.is_available() else [])))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"querying torch for its devices failed:\n{done.stderr[-2000:]}")
    cpu, *gpu = json.loads(done.stdout.splitlines()[-1])
    if device == "cuda" and not gpu:
        raise ValueError("torch finds no CUDA device; `--device cpu` tests the check itself at tiny shapes")
    about: dict[str, Any] = {"device": gpu[0] if device == "cuda" else cpu, "cpu": cpu}
    if device == "cuda":
        about |= {"memory_bytes": gpu[1], "cuda": gpu[2], "compute_capability": gpu[3], "driver": _driver()}
    return about | {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
