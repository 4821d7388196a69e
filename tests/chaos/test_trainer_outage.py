"""Teachers that die, hang, come back, or come back as somebody else, under a trainer that runs: it waits, goes on with
the same trace, or stops before it learns anything wrong.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.teacher_process import TeacherProcess, free_port
from tests.trainer_run import (
    SIGKILL,
    TrainerProcess,
    Workshop,
    final_files,
    steps_of,
    teacher_script,
    trace_of,
    train,
    wait_for_step,
)

STEPS = 30
# Slow enough that a fault falls between steps, quick enough for a test.
SLOW = {"delay_s": 0.05}


def arguments(workshop: Workshop, root: Path, *urls: str) -> list[str]:
    return workshop.settings(
        root, f"run.steps={STEPS}", "prefetch.depth=1", "checkpoint.every=10", "teacher.read_timeout_s=2",
        "teacher.log_every_s=1", "teacher.save_after_s=2", f"teacher.url=[{','.join(urls)}]",
    )  # fmt: skip


def test_a_trainer_that_was_there_first_steps_as_soon_as_its_teacher_is_ready(
    workshop: Workshop, tmp_path: Path
) -> None:
    port = free_port()
    settings = [*arguments(workshop, tmp_path, f"http://127.0.0.1:{port}"), "teacher.start_within_s=120"]
    with TrainerProcess(settings, tmp_path / "output.txt") as trainer:
        # Long enough for its probes to have grown as rare as they get.
        time.sleep(12)
        assert trainer.running
        with again(port):
            ready = time.time()
            wait_for_step(tmp_path / "run", 1, trainer)
            took = time.time() - ready
            print(f"first step {took:.1f} s after the teacher was ready")
            assert took < 15
            assert trainer.wait() == 0
    assert "yet, waiting" in trainer.text


def test_a_trainer_waits_for_a_teacher_that_loads_its_model(workshop: Workshop, tmp_path: Path) -> None:
    port = free_port()
    given = arguments(workshop, tmp_path, f"http://127.0.0.1:{port}")
    patient = [*given, "teacher.start_within_s=600"]
    with TrainerProcess(patient, tmp_path / "output.txt") as trainer:
        # It loads for longer than any test takes; the one after it is there at once.
        with TeacherProcess(script=teacher_script(start_s=3600.0), port=port, wait=False) as loading:
            wait_alive(port)
            assert train(given, tmp_path / "impatient.txt") == 75
            deadline = time.monotonic() + 120
            while "service is still loading its model" not in trainer.text:
                assert trainer.running and time.monotonic() < deadline, trainer.text
                time.sleep(0.1)
            die(loading)
        with TeacherProcess(script=teacher_script(), port=port):
            assert trainer.wait(240) == 0, trainer.text
    assert "still loading its model" in (tmp_path / "impatient.txt").read_text()
    assert "teacher.start_within_s=600" in (tmp_path / "impatient.txt").read_text()


@pytest.fixture(scope="module")
def straight(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("straight")
    with TeacherProcess(script=teacher_script()) as teacher:
        assert train(arguments(workshop, root, teacher.url), root / "output.txt") == 0
    yield root / "run"


def assert_same(folder: Path, straight: Path) -> None:
    assert trace_of(folder) == trace_of(straight)
    assert final_files(folder, STEPS) == final_files(straight, STEPS)


def die(teacher: TeacherProcess) -> None:
    teacher.signal(SIGKILL)
    teacher.wait()


def wait_alive(port: int) -> None:
    """Until a service answers there, be it only that its model loads."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health/live")
            return
        time.sleep(0.05)
    raise AssertionError(f"nobody answers at port {port}")


def again(port: int, **changes: Any) -> TeacherProcess:
    """A teacher on the port where another one was."""
    return TeacherProcess(script=teacher_script(**(SLOW | changes)), port=port)


@pytest.mark.parametrize("gone_s", [4.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_the_only_teacher_dies_and_comes_back_and_the_trace_is_the_same(
    workshop: Workshop, straight: Path, tmp_path: Path, gone_s: float
) -> None:
    with (
        TeacherProcess(script=teacher_script(**SLOW)) as teacher,
        TrainerProcess(arguments(workshop, tmp_path, teacher.url), tmp_path / "output.txt") as trainer,
    ):
        wait_for_step(tmp_path / "run", 12, trainer)
        die(teacher)
        time.sleep(gone_s)
        assert trainer.running and steps_of(tmp_path / "run")[-1] < STEPS
        with again(teacher.port):
            assert trainer.wait() == 0, trainer.text
    assert "no targets for" in trainer.text and "training is waiting" in trainer.text
    assert_same(tmp_path / "run", straight)


def test_replicas_that_are_killed_in_turn_cost_nothing_but_time(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    draw = random.Random(5)
    replicas = [TeacherProcess(script=teacher_script(**SLOW)) for _ in range(2)]
    try:
        urls = [replica.url for replica in replicas]
        with TrainerProcess(arguments(workshop, tmp_path, *urls), tmp_path / "output.txt") as trainer:
            for aim in (4, 11, 18):
                wait_for_step(tmp_path / "run", aim, trainer)
                time.sleep(draw.uniform(0, 0.2))
                victim = draw.randrange(2)
                port = replicas[victim].port
                die(replicas[victim])
                replicas[victim].stop()
                replicas[victim] = again(port)
            assert trainer.wait() == 0, trainer.text
    finally:
        for replica in replicas:
            replica.stop()
    assert_same(tmp_path / "run", straight)


def test_a_replica_that_hangs_is_left_for_the_other(workshop: Workshop, straight: Path, tmp_path: Path) -> None:
    with (
        TeacherProcess(script=teacher_script(**SLOW)) as one,
        TeacherProcess(script=teacher_script(**SLOW)) as other,
        TrainerProcess(arguments(workshop, tmp_path, one.url, other.url), tmp_path / "output.txt") as trainer,
    ):
        wait_for_step(tmp_path / "run", 5, trainer)
        one.signal(signal.SIGSTOP)
        assert trainer.wait() == 0, trainer.text
        one.signal(signal.SIGCONT)
    assert_same(tmp_path / "run", straight)


def test_another_teacher_behind_the_same_port_stops_the_run_before_it_teaches(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    with (
        TeacherProcess(script=teacher_script(**SLOW)) as teacher,
        TrainerProcess(arguments(workshop, tmp_path, teacher.url), tmp_path / "output.txt") as trainer,
    ):
        wait_for_step(tmp_path / "run", 6, trainer)
        die(teacher)
        with again(teacher.port, identity={"semantic.weights": '{"scripted": "swapped"}'}):
            assert trainer.wait() == 2, trainer.text
    assert "semantic.weights" in trainer.text and "Traceback" not in trainer.text
    ours, theirs = trace_of(tmp_path / "run"), trace_of(straight)
    assert ours == theirs[: len(ours)] and len(ours) < STEPS


def test_damaged_weights_under_the_same_name_are_caught_at_connect(workshop: Workshop, tmp_path: Path) -> None:
    with TeacherProcess(script=teacher_script()) as teacher:
        stopped = [*arguments(workshop, tmp_path, teacher.url), "run.allow_changes=[run.steps]"]
        assert train([*stopped, "run.steps=4"], tmp_path / "output.txt") == 0
    with TeacherProcess(script=teacher_script(noise=1e-2)) as damaged:
        resumed = [*arguments(workshop, tmp_path, damaged.url), "run.allow_changes=[run.steps]", "run.steps=8"]
        assert train(resumed, tmp_path / "damaged.txt") == 2
    assert "canary" in (tmp_path / "damaged.txt").read_text()
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_the_run_gives_up_after_its_time_and_another_start_goes_on_where_it_was(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    with TeacherProcess(script=teacher_script(**SLOW)) as teacher:
        given = [*arguments(workshop, tmp_path, teacher.url), "teacher.outage_timeout_s=3"]
        with TrainerProcess(given, tmp_path / "output.txt") as trainer:
            wait_for_step(tmp_path / "run", 6, trainer)
            die(teacher)
            assert trainer.wait() == 75
    assert "teacher.outage_timeout_s is 3" in trainer.text and "Traceback" not in trainer.text
    stopped_at = steps_of(tmp_path / "run")[-1]
    assert stopped_at < STEPS
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step-{stopped_at:08d}"
    with TeacherProcess(script=teacher_script()) as teacher:
        assert train(arguments(workshop, tmp_path, teacher.url), tmp_path / "again.txt") == 0
    assert f"resumed at step {stopped_at} of" in (tmp_path / "again.txt").read_text()
    assert_same(tmp_path / "run", straight)


def test_data_that_are_away_at_the_start_are_worth_another_one(workshop: Workshop, tmp_path: Path) -> None:
    nobody = f"data.sources.a.path=http://127.0.0.1:{free_port()}/a.jsonl"
    assert train([*arguments(workshop, tmp_path, "http://127.0.0.1:1"), nobody], tmp_path / "away.txt") == 75
    assert "Traceback" not in (tmp_path / "away.txt").read_text()
    missing = f"data.sources.a.path={tmp_path}/missing.jsonl"
    assert train([*arguments(workshop, tmp_path, "http://127.0.0.1:1"), missing], tmp_path / "missing.txt") == 2
