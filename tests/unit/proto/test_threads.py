"""Waiting threads spin briefly, in the process and in libgomp: `teacher_proto.process.threads`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_proto.process.threads import CHOSEN_BY, SPINS, spin_briefly

# The process ends as it is about to import torch, and says what libgomp would find.
COMMAND = """
import os, sys

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch())
from {module} import main
main({arguments})
"""
TRAIN = ["check", "teacher=none", "distillation=cross_entropy", "data=short_texts", "student.checkpoint_path={model}"]
COMMANDS = {
    "student_trainer.main": TRAIN,
    "teacher_service.main": ["{model}", "--engine", "hf", "--port", "0"],
    "attention_service.main": ["{model}", "--port", "0"],
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": str(SPINS)}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_the_environment_chooses_stays(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
) -> None:
    for name in CHOSEN_BY:
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    assert {name: os.environ[name] for name in CHOSEN_BY if name in os.environ} == expected


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_chooses_before_torch_is_imported(module: str, tiny_llama: Path) -> None:
    code = COMMAND.format(module=module, arguments=[part.format(model=tiny_llama) for part in COMMANDS[module]])
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{SPINS}\n", done.stderr


def test_libgomp_reads_it() -> None:
    code = "from teacher_proto.process.threads import spin_briefly; spin_briefly(); import torch"
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr
