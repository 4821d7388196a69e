"""What the image's build asks of uv for each build of torch: its own commands, run with a `uv` that writes down."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

DOCKERFILE = Path(__file__).resolve().parents[2] / "deploy" / "Dockerfile"


def install_command() -> str:
    """The shell of the step that installs the packages, as Docker hands it to sh."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    [step] = [line for line in text.splitlines() if line.startswith("RUN ") and "pyproject.toml --extra" in line]
    return re.sub(r"--mount=\S+", "", step.removeprefix("RUN "))


def asked_of_uv(tmp_path: Path, **environment: str) -> list[str]:
    """The arguments that the step calls uv with."""
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$UV_ARGUMENTS"\n')
    uv.chmod(0o755)
    told = tmp_path / "arguments"
    path = f"{tmp_path}:/usr/bin:/bin"
    environment = {"PATH": path, "UV_ARGUMENTS": str(told), "UV_FIND_LINKS": "", **environment}
    subprocess.run(["sh", "-euc", install_command()], check=True, env=environment, timeout=30)
    return told.read_text().split()


def default(name: str) -> str:
    [value] = re.findall(rf"^ARG {name}=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return value


def test_by_default_torch_is_the_cuda_build_and_no_driver_is_asked_for(tmp_path: Path) -> None:
    arguments = asked_of_uv(tmp_path, EXTRA="teacher", TORCH_BACKEND=default("TORCH_BACKEND"))
    assert "--torch-backend" not in arguments and "--overrides" not in arguments
    assert arguments[-2:] == ["--extra", "teacher"]


def test_a_cpu_image_takes_the_cpu_build(tmp_path: Path) -> None:
    arguments = asked_of_uv(tmp_path, EXTRA="teacher-cpu", TORCH_BACKEND="cpu")
    assert arguments[arguments.index("--torch-backend") + 1] == "cpu"
    assert arguments[arguments.index("--overrides") + 1] == "overrides-cpu.txt"


@pytest.mark.parametrize("backend", ["cu126", "rocm6.4"])
def test_another_build_goes_by_uvs_name(tmp_path: Path, backend: str) -> None:
    arguments = asked_of_uv(tmp_path, EXTRA="trainer", TORCH_BACKEND=backend)
    assert arguments[arguments.index("--torch-backend") + 1] == backend
    assert "--overrides" not in arguments


def test_a_base_with_local_wheels_asks_no_index(tmp_path: Path) -> None:
    arguments = asked_of_uv(tmp_path, EXTRA="trainer", TORCH_BACKEND="cpu", UV_FIND_LINKS="/wheels")
    assert "--torch-backend" not in arguments and "--overrides" in arguments


def test_nothing_that_is_deployed_builds_with_auto() -> None:
    for file in [DOCKERFILE, *DOCKERFILE.parent.parent.glob("*.yml"), *DOCKERFILE.parent.glob("*.yml")]:
        assert not re.search(r"TORCH_BACKEND[=:]\s*auto", file.read_text()), file.name
