"""SIGTERM and Ctrl-C at every stage of the trainer and the command-line tools, and at random moments: the process ends
within seconds, with 75, with nothing of its own left running, and what it goes on from is what it was.

Each stage is forced: it is made long, and the signal comes after the line by which the terminal tells of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_proto.process.tree import descendants
from tests.teacher_process import TeacherProcess, free_port
from tests.trainer_run import TrainerProcess, Workshop, final_files, teacher_script, trace_of, train

# Promised are 5 s, which a quiet machine keeps by far; a busy one is given three times as long.
BOUND_S = 15.0
STEPS = 12


def fields_of(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on; of none, those of a process that is over."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0", "0", "0"]


def runs(pid: int) -> bool:
    return fields_of(pid)[0] not in "ZX"


def in_session(session: int) -> list[int]:
    """The processes of a session that still run."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if runs(pid) and int(fields_of(pid)[3]) == session]


class Commanded:
    """A command in a process and a session of its own, `python -m MODULE ARGUMENTS`; it prints to `output`."""

    def __init__(self, module: str, arguments: Sequence[str], output: Path):
        self.output = output
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def text(self) -> str:
        return self.output.read_text()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 120.0) -> int:
        return self._process.wait(timeout_s)

    def __enter__(self) -> Commanded:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def stopped(process: TrainerProcess | Commanded, number: int, what: str) -> int:
    """Signal it and hold what is promised against what it does; the exit code."""
    started = descendants(process.pid)  # in whatever session
    asked = time.monotonic()
    process.signal(number)
    code = process.wait(60)
    took_s = time.monotonic() - asked
    left = in_session(process.pid) + [pid for pid in started if runs(pid)]
    print(f"{what}: {signal.Signals(number).name}, ended with {code} after {took_s:.2f} s")
    assert took_s < BOUND_S, process.text
    assert not left, f"{left} are left running"
    assert "Traceback" not in process.text, process.text
    return code


def wait_for(said: str, process: TrainerProcess | Commanded, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while said not in process.text:
        assert process.running, f"it ended before it said {said!r}:\n{process.text}"
        assert time.monotonic() < deadline, f"it never said {said!r}:\n{process.text}"
        time.sleep(0.02)


def write_random(path: Path, count: int, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"input_ids": draw.integers(2, 30, 40).tolist()}) + "\n")
    return path


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough random documents that reading and evaluating them takes a while."""
    return write_random(tmp_path_factory.mktemp("plenty") / "documents.jsonl", 30_000, 0)


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that no other test has: the teacher keeps what it was asked about."""
    seed = random.SystemRandom().randrange(10**6)
    return write_random(tmp_path_factory.mktemp("fresh") / "documents.jsonl", 1000, seed)


@pytest.fixture(scope="module")
def slow_teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess(script=teacher_script(tokens_per_second=15.0)) as teacher:
        yield teacher


@dataclass(frozen=True)
class Stage:
    """`overrides` make it long, `said` is what the terminal says in it. `teacher`: which one is asked."""

    said: str
    overrides: tuple[str, ...] = ()
    teacher: str = "none"


OWN_TEXT = ("on_policy.share=1", "on_policy.new_tokens=40", "on_policy.prompt_tokens=4", "data.seq_len=2048",
            "data.rows=64")  # fmt: skip
FRESH = ("data.sources.a.path={fresh}", "data.sources.b.path={fresh}", "data.cache_folder={tmp}")
STAGES = {
    "waiting for a teacher": Stage("yet, waiting", ("teacher.start_within_s=600",), "gone"),
    "indexing": Stage("indexing source", ("data.sources.a.path={plenty}", "data.cache_folder={tmp}")),
    "held-out targets": Stage("held-out targets: ", (*FRESH, "evaluation.every=6", "data.held_out_rows=30"), "slow"),
    "targets of a step": Stage("waiting for the targets of step 1: ", (*FRESH, "data.rows=30"), "slow"),
    "evaluating": Stage("evaluating: ", ("data.sources.a.path={plenty}", "evaluation.every=6",
                                         "data.sources.a.held_out_fraction=0.9", "data.held_out_rows=20000")),
    "samples": Stage("writing samples: ", ("evaluation.every=6", "evaluation.sample_tokens=20000")),
    # Updates of seconds follow each other, and between two of them there is next to nothing.
    "update": Stage("step 1/", ("data.sources.a.path={plenty}", "data.rows=4096",
                                             "optim.micro_batch_rows=4")),
}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", STAGES)
def test_a_signal_in_any_stage_of_a_run_ends_it(
    name: str, number: int, workshop: Workshop, plenty: Path, fresh: Path, slow_teacher: TeacherProcess, tmp_path: Path
) -> None:
    if number == signal.SIGINT and name not in ("held-out targets", "update"):
        pytest.skip("the two signals are handled alike: two stages with both")
    stage = STAGES[name]
    url = {"slow": slow_teacher.url, "gone": f"http://127.0.0.1:{free_port()}", "none": None}[stage.teacher]
    given = [override.format(plenty=plenty, fresh=fresh, tmp=tmp_path) for override in stage.overrides]
    alone = ["teacher=none", "distillation=cross_entropy"] if url is None else []
    arguments = [line for line in workshop.settings(tmp_path, url=url) if "logging.progress" not in line]
    seed = random.SystemRandom().randrange(10**6)
    with TrainerProcess([*arguments, *alone, *given], tmp_path / "output.txt", os.setsid) as trainer:
        wait_for(stage.said, trainer)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        assert stopped(trainer, number, f"{name} (seed {seed})") == 75
    assert (
        "there is nothing to save" in trainer.text
        or "started it again" in trainer.text
        or "start it again" in trainer.text
    )


def tools(
    workshop: Workshop, plenty: Path, fresh: Path, teacher: TeacherProcess, tmp: Path
) -> dict[str, tuple[str, list[str], str]]:
    """By name: the module, its arguments, and what it says in its long stage."""
    base = [line for line in workshop.settings(tmp) if "logging.progress" not in line]
    fill = ["fill", "scripted", str(plenty), "--engine", "scripted", "--store", str(tmp / "store")]
    script = ["--script", json.dumps(teacher_script(tokens_per_second=50.0))]
    asked = [f"data.sources.a.path={fresh}", f"data.sources.b.path={fresh}", "data.rows=30"]
    asked += [f"data.cache_folder={tmp}", f"teacher.url={teacher.url}"]
    return {
        "check": ("student_trainer.main", ["check", *base, *asked], "targets of batch 0: "),
        "sequences": ("student_trainer.main", ["sequences", str(tmp / "sequences.jsonl"), *base, "run.steps=1000000"],
                      "reading batches: "),
        "fill": ("teacher_service.main", [*fill, *script], "filling: "),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["check", "sequences", "fill"])
def test_a_signal_ends_the_other_commands(
    name: str, workshop: Workshop, plenty: Path, fresh: Path, slow_teacher: TeacherProcess, tmp_path: Path
) -> None:
    module, arguments, said = tools(workshop, plenty, fresh, slow_teacher, tmp_path)[name]
    with Commanded(module, arguments, tmp_path / "output.txt") as command:
        wait_for(said, command)
        assert stopped(command, signal.SIGTERM, name) == 75
    assert not list(tmp_path.glob("sequences*")), "half a file is left"
    if name == "fill":
        from teacher_proto.store.target_store import TargetStore

        with TargetStore(tmp_path / "store", readonly=True) as store:
            assert store.stats().entries > 0, "what was scored is not kept"


@pytest.fixture(scope="module")
def ended(workshop: Workshop, teacher: TeacherProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is over, `run`, and a target store, `store`."""
    root = tmp_path_factory.mktemp("ended")
    arguments = workshop.settings(root, "run.steps=2", url=teacher.url)
    assert train(arguments, root / "output.txt") == 0, (root / "output.txt").read_text()
    fill = ["fill", "scripted", str(workshop.sources["a"]), "--engine", "scripted", "--store", str(root / "store")]
    with Commanded("teacher_service.main", fill, root / "fill.txt") as command:
        assert command.wait() == 0, command.text
    return root


QUICK = {
    "export": ("student_trainer.main", "export {ended}/run --format hf --out {tmp}/made"),
    "report": ("student_trainer.main", "report {ended}/run --out {tmp}/made"),
    "pack": ("teacher_service.main", "pack export {ended}/store {tmp}/made"),
}


@pytest.mark.parametrize("name", QUICK)
def test_a_signal_at_any_moment_leaves_all_of_what_a_command_makes_or_nothing(
    name: str, ended: Path, tmp_path: Path
) -> None:
    """Started again, it makes it."""
    module, words = QUICK[name]
    arguments = words.format(ended=ended, tmp=tmp_path).split()
    seed = random.SystemRandom().randrange(10**6)
    with Commanded(module, arguments, tmp_path / "output.txt") as command:
        time.sleep(random.Random(seed).uniform(0.3, 4.0))
        code = stopped(command, signal.SIGTERM, f"{name} (seed {seed})") if command.running else command.wait()
    made = tmp_path / "made"
    if code == 0:
        assert made.exists()
    else:
        assert code == 75, command.text
        if made.is_file():
            assert made.read_text().rstrip().endswith("</html>"), "half of the page is left"
        assert not made.is_dir() or not any(made.iterdir()), "half of it is left"
        with Commanded(module, arguments, tmp_path / "again.txt") as command:
            assert command.wait() == 0, command.text
    assert {path.name for path in tmp_path.iterdir()} <= {"output.txt", "again.txt", "made"}


def set_cache(folder: str) -> None:
    os.setsid()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor finds no C++ compiler")
def test_a_signal_while_the_student_is_compiled_ends_the_compilers_too(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    arguments = workshop.settings(tmp_path, "student.compile=true", url=teacher.url)
    nothing_compiled = partial(set_cache, str(tmp_path / "cache"))
    with TrainerProcess(arguments, tmp_path / "output.txt", nothing_compiled) as trainer:
        deadline = time.monotonic() + 200
        while not (compilers := descendants(trainer.pid)):
            assert trainer.running and time.monotonic() < deadline, trainer.text
            time.sleep(0.02)
        assert stopped(trainer, signal.SIGTERM, f"compiling, with {len(compilers)} processes") == 75
        assert not [pid for pid in compilers if runs(pid)]


def get_stuck(update: int) -> None:
    """In the backward pass of update `update`, counted from 0, the main thread of this process stays in native code."""
    import ctypes

    import torch

    os.setsid()
    backward, calls, libc = torch.Tensor.backward, iter(range(10**6)), ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)

    def stuck(*given: Any, **named: Any) -> None:
        backward(*given, **named)
        if next(calls) == update:
            print("stuck", flush=True)
            libc.pthread_mutex_lock(mutex)

    torch.Tensor.backward = stuck  # type: ignore[method-assign]


def test_a_run_that_is_stuck_in_a_native_call_is_saved_as_the_update_before_left_it(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    arguments = workshop.settings(tmp_path, "evaluation.every=6", "checkpoint.every=100", url=teacher.url)
    assert train([*arguments, "run.id=straight"], tmp_path / "straight.txt") == 0
    with TrainerProcess([*arguments, "run.id=stuck"], tmp_path / "output.txt", partial(get_stuck, 5)) as trainer:
        wait_for("stuck", trainer)
        time.sleep(0.5)
        assert stopped(trainer, signal.SIGTERM, "in a native call") == 75
        assert "saving without it" in trainer.text
    assert [path.name for path in (tmp_path / "stuck" / "checkpoints").glob("step-*")] == ["step-00000005"]
    assert train([*arguments, "run.id=stuck"], tmp_path / "again.txt") == 0
    assert trace_of(tmp_path / "stuck") == trace_of(tmp_path / "straight")
    assert final_files(tmp_path / "stuck", STEPS) == final_files(tmp_path / "straight", STEPS)


@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.5])
def test_a_signal_while_libraries_are_imported_ends_it(workshop: Workshop, tmp_path: Path, after_s: float) -> None:
    with Commanded("student_trainer.main", workshop.settings(tmp_path), tmp_path / "output.txt") as command:
        time.sleep(after_s)
        code = stopped(command, signal.SIGTERM, f"{after_s} s after the start")
    # Before Python has come to the command's first line, the signal ends it as it ends any process.
    assert code == 75 or (code == -signal.SIGTERM and not command.text), command.text


def stop_and_resume(
    workshop: Workshop, teacher: TeacherProcess, root: Path, count: int,
    start: Callable[[list[str], Path], TrainerProcess | Commanded],
) -> None:  # fmt: skip
    """A straight run, and `count` that are stopped at a random moment from their start to their end, and go on."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    arguments = workshop.settings(root, "run.steps=3", "evaluation.every=2", url=teacher.url)
    with start(["--help"], root / "help.txt") as trainer:
        trainer.wait()  # whatever a first start alone takes is not counted
    began = time.monotonic()
    with start([*arguments, "run.id=straight"], root / "straight.txt") as trainer:
        assert trainer.wait(300) == 0, trainer.text
    took_s = time.monotonic() - began
    for number in range(count):
        name = f"stopped-{number}"
        moment = draw.uniform(0, took_s)
        with start([*arguments, f"run.id={name}"], root / f"{name}.txt") as trainer:
            time.sleep(moment)
            if trainer.running:
                code = stopped(trainer, signal.SIGTERM, f"after {moment:.2f} of {took_s:.2f} s")
                # Before the command's first line, the signal ends it as it ends any process.
                assert code in (0, 75) or (code == -signal.SIGTERM and not trainer.text), trainer.text
        assert train([*arguments, f"run.id={name}"], root / "again.txt") == 0, (root / "again.txt").read_text()
        assert trace_of(root / name) == trace_of(root / "straight")
        assert final_files(root / name, 3) == final_files(root / "straight", 3)
        assert evaluations(root / name) == evaluations(root / "straight")


def evaluations(folder: Path) -> str:
    return (folder / "evaluation.jsonl").read_text()


def test_signals_at_random_moments_change_nothing(workshop: Workshop, teacher: TeacherProcess, tmp_path: Path) -> None:
    stop_and_resume(workshop, teacher, tmp_path, 6, lambda given, output: TrainerProcess(given, output, os.setsid))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_signals_from_the_start_of_the_process_on_change_nothing(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    stop_and_resume(
        workshop, teacher, tmp_path, 20, lambda given, output: Commanded("student_trainer.main", given, output)
    )
