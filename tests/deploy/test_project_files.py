"""What code hosts, editors and git read of the project says nothing that is not so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_a_code_host_decides_by_the_same_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_hooks_of_a_commit_run_what_is_there() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in local["hooks"]:
        program, *arguments = hook["entry"].split()
        if program == "make":
            assert set(arguments) <= TARGETS, hook
        else:
            assert program.startswith(".venv/bin/"), hook
            assert all((ROOT / each).exists() for each in arguments if "/" in each), hook


def test_a_container_for_development_is_set_up_by_a_target_of_the_makefile() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    program, target = container["postCreateCommand"].split()
    assert program == "make" and target in TARGETS
