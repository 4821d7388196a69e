"""A trainer whose student writes batches, killed at random and resumed, is the straight run bit for bit: with the real
service, once with the scripted engine and once with a language model behind it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from student_trainer.checkpoint import checkpoints as checkpoint
from tests.models import save_tiny_llama
from tests.teacher_process import TeacherProcess
from tests.trainer_run import (
    SIGKILL,
    SIGTERM,
    TrainerProcess,
    Workshop,
    final_files,
    lines_of,
    teacher_script,
    trace_of,
    train,
    wait_for_step,
)

STEPS, EVERY = 24, 5


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module", params=["scripted", "model"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    if request.param == "scripted":
        with TeacherProcess(script=teacher_script()) as process:
            yield process
    else:
        folder = save_tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7)
        with TeacherProcess(str(folder), "--engine", "hf", "--dtype", "float32") as process:
            yield process


@pytest.mark.parametrize("lag", [1, 3])
def test_a_killed_and_resumed_run_is_the_straight_run(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path, lag: int
) -> None:
    def arguments(root: Path) -> list[str]:
        return workshop.settings(
            root, "on_policy=gkd", f"on_policy.lag={lag}", "on_policy.share=0.7", "on_policy.prompt_tokens=6",
            "on_policy.new_tokens=10", f"run.steps={STEPS}", f"checkpoint.every={EVERY}", "teacher.sanity=off",
            "evaluation.every=12", "evaluation.samples=2", "evaluation.sample_tokens=8", url=teacher.url,
        )  # fmt: skip

    assert train(arguments(tmp_path / "straight"), tmp_path / "straight.txt") == 0, (
        tmp_path / "straight.txt"
    ).read_text()
    draw = random.Random(lag)
    for signal, code in ((SIGKILL, -SIGKILL), (SIGTERM, 75), (SIGKILL, -SIGKILL)):
        kept = checkpoint.newest(tmp_path / "run" / "checkpoints")
        aim = min(STEPS - 3, (kept.step if kept else 0) + draw.randint(2, 9))
        started = time.time()
        with TrainerProcess(arguments(tmp_path), tmp_path / "output.txt") as trainer:
            wait_for_step(tmp_path / "run", aim, trainer, since=started)
            time.sleep(draw.uniform(0, 0.1))
            trainer.signal(signal)
            assert trainer.wait() == code
    assert train(arguments(tmp_path), tmp_path / "output.txt") == 0
    straight = tmp_path / "straight" / "run"
    assert trace_of(tmp_path / "run") == trace_of(straight)
    assert final_files(tmp_path / "run", STEPS) == final_files(straight, STEPS)
    for name in ("evaluation.jsonl", "samples.jsonl"):
        assert lines_of(tmp_path / "run", name) == lines_of(straight, name) != []
