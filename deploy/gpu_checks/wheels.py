"""Wheels for a machine without a network: `--wheels` collects them elsewhere, `--install` unpacks them. Called by
`__main__`.

Needs only Python, and pip to collect. The machine must already have torch, transformers, Triton, numpy, pyarrow,
pandas, httpx, msgpack, fsspec and rich, which are not collected.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

# What proto, services and trainer import that a machine with torch and transformers may lack: with dependencies, ...
WITH_NEEDS = ("pydantic", "pydantic-settings", "fastapi", "starlette", "uvicorn", "httptools", "structlog", "lmdb")
# ... and without, since the machine has their large dependencies (pyarrow, pandas, torch); the small ones are here.
ALONE = ("hydra-core", "omegaconf", "antlr4-python3-runtime==4.9.*", "datasets", "dill", "multiprocess", "liger-kernel")
CONSTRAINTS = Path(__file__).resolve().parent.parent.parent / "constraints.txt"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64",
             "manylinux_2_5_x86_64", "manylinux1_x86_64")  # fmt: skip


def collect(folder: Path, python: str | None) -> int:
    """Returns the exit code: 1 if a wheel cannot be had, after all the others were tried."""
    version = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    target += [part for platform in PLATFORMS for part in ("--platform", platform)]
    together = [_pinned(name) for name in WITH_NEEDS]
    missing = together if _run([*pip, "download", "--dest", str(folder), *target, *together]) else []
    for name in map(_pinned, ALONE):
        download = [*pip, "download", "--no-deps", "--dest", str(folder), *target, name]
        # One is available as source only. It is pure Python, so a wheel built here works there.
        build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), name]
        if _run(download, quietly=True) and _run(build):
            missing.append(name)
    found = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in found)
    print(f"{folder}: {len(found)} wheels for Python {version}, {size / 1e6:.1f} MB")
    if missing:
        print(f"not available: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def _run(command: list[str], quietly: bool = False) -> int:
    return subprocess.run(command, stderr=subprocess.DEVNULL if quietly else None, check=False).returncode


def _pinned(wanted: str) -> str:
    """The requirement with its version in constraints.txt, if there is one."""
    for line in CONSTRAINTS.read_text().splitlines():
        name, _, version = line.partition("==")
        if _plain(name) == _plain(wanted) and version:
            return f"{wanted}=={version.split(';')[0].split()[0]}"
    return wanted


def unpack(folder: Path, site: Path) -> None:
    """Unpack into `site` the wheels that this Python does not have in that version; wheels are zip files of modules."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"gpu_check: no wheels in {folder}; `deploy/gpu_check --wheels {folder}` collects them")
    site.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        name, version = wheel.name.split("-")[:2]
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = None
        if there == version:
            print(f"{name} {version} is already installed")
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        print(f"{name} {version}, unpacked into {site}" + (f", used instead of {there}" if there else ""))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
