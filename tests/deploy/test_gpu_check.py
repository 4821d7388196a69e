"""`deploy/gpu_check`: all of it at tiny shapes on a CPU, and that no section hides another, however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deploy.gpu_checks import run, wheels
from deploy.gpu_checks.run import Section

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [str(ROOT / "deploy" / "gpu_check")]
BROKEN = "tests.deploy.gpu_sections"


def call(*arguments: str, timeout_s: float = 560.0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=timeout_s)


@pytest.mark.timeout(600)
def test_all_of_it_on_a_cpu_at_tiny_shapes(tmp_path: Path) -> None:
    done = call("--device", "cpu", "--minutes", "9", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    card = json.loads((tmp_path / "CARD.json").read_text())
    assert card["correct"] and card["packages"]["torch"]
    sections = card["sections"]
    left_out = {"vllm", "step_1.7B"}  # of a CPU
    assert {name: found["state"] for name, found in sections.items()} == {
        section.name: "left out" if section.name in left_out else "passed" for section in run.SECTIONS
    }
    checks = [line["check"] for line in sections["head"]["checks"]]
    for part in (
        "float32",
        "bfloat16",
        "jsd",
        "tvd",
        "sampled",
        "float32 computed in bfloat16",
        "gather",
        "full",
        "T=5",
        "renormalise",
    ):
        assert any(part in check for check in checks), part
    assert any("bytes" in line["check"] for line in sections["reduction"]["checks"])
    assert any("resumed at step 3" in line["check"] or "resumed at step 6" in line["check"]
               for line in sections["resume"]["checks"])  # fmt: skip
    figures = {line["figure"].split(",")[0]: line["value"] for line in sections["step_0.6B"]["figures"]}
    assert figures["tokens per second"] > 0 and figures["recompilations after the second step"] == 0
    assert any("cross-entropy" in line["figure"] for line in sections["head_speed"]["figures"])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("sound", "wrong", "raising", "crashing", "hanging", "idle")
    sections = [Section(name, name, BROKEN, 4 if name == "hanging" else 60, function=name) for name in names]
    sections.append(Section("slow figures", "figures", BROKEN, 60, counts=False, function="raising"))
    monkeypatch.setattr(run, "SECTIONS", tuple(sections))


def card_of(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((folder / "CARD.json").read_text())
    return card


@pytest.mark.usefixtures("broken")
def test_a_section_that_fails_crashes_or_hangs_hides_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run.run_sections([section.name for section in run.SECTIONS], "cpu", tmp_path, 400) == 1
    card = card_of(tmp_path)
    assert {name: found["state"] for name, found in card["sections"].items()} == {
        "sound": "passed", "wrong": "failed", "raising": "failed", "crashing": "crashed", "hanging": "out of time",
        "idle": "left out", "slow figures": "failed",
    }  # fmt: skip
    for name in ("raising", "crashing", "hanging"):
        assert [line["check"] for line in card["sections"][name]["checks"]] == ["before"]
    assert any("ZeroDivisionError" in note for note in card["sections"]["raising"]["notes"])
    assert [line["passed"] for line in card["sections"]["wrong"]["checks"]] == [False, False]
    # What a section started goes with it.
    pid = (tmp_path / "sections" / "hanging" / "child").read_text()
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    printed = capfd.readouterr().out
    assert "FAIL  one and one" in printed and "not correct: wrong, raising, crashing, hanging" in printed


@pytest.mark.usefixtures("broken")
def test_figures_alone_fail_nothing_and_no_time_left_is_not_a_pass(tmp_path: Path) -> None:
    assert run.run_sections(["sound", "slow figures", "idle"], "cpu", tmp_path / "a", 400) == 0
    assert card_of(tmp_path / "a")["correct"]
    assert run.run_sections(["sound"], "cpu", tmp_path / "b", 1) == 1
    assert card_of(tmp_path / "b")["sections"]["sound"]["state"] == "out of time"


def test_correctness_leaves_time_for_figures() -> None:
    """Of eight minutes, which end whatever is still to do."""
    assert sum(section.budget_s for section in run.SECTIONS if section.counts and section.name != "vllm") <= 5.5 * 60
    # Correctness comes first.
    counts = [section.counts for section in run.SECTIONS]
    assert counts == sorted(counts, reverse=True)


def test_what_can_t_be_run_as_asked_says_so(tmp_path: Path) -> None:
    done = call("--only", "heads", "--out", str(tmp_path))
    assert done.returncode == 2 and "unknown section heads" in done.stderr
    import torch

    if not torch.cuda.is_available():
        done = call("--out", str(tmp_path))
        assert done.returncode == 2 and "--device cpu" in done.stderr


def test_wheels_are_unpacked_where_another_version_or_none_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy

    (folder := tmp_path / "wheels").mkdir()
    for name, version in (("numpy", numpy.__version__), ("numpy", "0.0.1"), ("stillhouse_unheard_of", "1.0")):
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}-{version}/marker.py", "")
    wheels.unpack(folder, tmp_path / "site")
    unpacked = {path.name for path in (tmp_path / "site").iterdir()}
    assert unpacked == {"numpy-0.0.1", "stillhouse_unheard_of-1.0"}
    assert f"used instead of {numpy.__version__}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--wheels"):
        wheels.unpack(tmp_path / "site", tmp_path / "again")


def test_every_wheel_that_the_box_lacks_is_pinned_by_the_constraints() -> None:
    for name in ("pydantic", "fastapi", "starlette", "uvicorn", "httptools", "structlog", "lmdb", "hydra-core",
                 "datasets", "liger-kernel", "omegaconf", "pydantic-settings"):  # fmt: skip
        assert "==" in wheels._pinned(name), name
    assert wheels._pinned("antlr4-python3-runtime==4.9.*") == "antlr4-python3-runtime==4.9.*"
