"""The relation term over the wire: real services, the trainer as a process, and what can go wrong on the way."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.models import save_tiny_llama
from tests.ranks_run import train_ranks
from tests.teacher_process import ServiceProcess, TeacherProcess
from tests.trainer_run import TrainerProcess, Workshop, lines_of, steps_of, trace_of, train, wait_for_step

TERM = ("distillation.attention.coefficient=1e3", "distillation.attention.relation_heads=8")


def attention_of(model: Path, port: int = 0) -> ServiceProcess:
    process = ServiceProcess("attention_service.main", str(model), "--dtype=float32", port=port, wait=False)
    try:
        process.wait_ready(180.0)
    except BaseException:
        process.stop()
        raise
    return process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("teacher") / "model", seed=7)


@pytest.fixture(scope="module")
def teacher(model: Path) -> Iterator[TeacherProcess]:
    with TeacherProcess(str(model), "--engine=hf", "--dtype=float32") as process:
        yield process


@pytest.fixture(scope="module")
def sidecar(model: Path) -> Iterator[ServiceProcess]:
    with attention_of(model) as process:
        yield process


def wait_until(true: Callable[[], bool], trainer: TrainerProcess, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert trainer.running and time.monotonic() < deadline, trainer.text
        time.sleep(0.05)


def arguments(workshop: Workshop, root: Path, teacher: TeacherProcess, url: str, *more: str) -> list[str]:
    sanity = "teacher.sanity=off"  # the text is not this teacher's
    return workshop.settings(root, *TERM, sanity, f"teacher.attention_url={url}", *more, url=teacher.url)


def test_bitdistill_learns_from_both_services(
    workshop: Workshop, teacher: TeacherProcess, sidecar: ServiceProcess, tmp_path: Path
) -> None:
    """Every term of the loss acts, in half precision over the wire or in int8."""
    student = ("student=bitnet", "student.bitnet.warmup_steps=2", "run.steps=3")
    first = []
    for transport in ("float16", "int8"):
        more = (*student, f"run.id={transport}", f"distillation.attention.transport={transport}")
        log = tmp_path / f"{transport}.log"
        assert train(arguments(workshop, tmp_path, teacher, sidecar.url, *more), log) == 0, log.read_text()
        lines = lines_of(tmp_path / transport)
        assert all(
            line[f"weighted/{name}"] > 0 for line in lines for name in ("cross_entropy", "top_k_kl", "attention")
        )
        first.append(lines[0]["loss/attention"])
    assert first[1] == pytest.approx(first[0], rel=1e-2)


@pytest.mark.parametrize("more", [(), ("distillation.balance.shares={cross_entropy: 1, top_k_kl: 1, attention: 1}",)])
def test_two_ranks_compare_their_own_documents(
    workshop: Workshop, teacher: TeacherProcess, sidecar: ServiceProcess, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """As one rank that takes two passes a step; the norm over shards scales the gradient within rounding."""
    one, two = (
        arguments(workshop, tmp_path / world, teacher, sidecar.url, "run.steps=4", *more) for world in ("one", "two")
    )
    assert train([*one, "optim.micro_batch_rows=2"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert train_ranks(2, two, tmp_path / "log-of-two") == [0, 0], (tmp_path / "log-of-two-1").read_text()
    for line, expected in zip(trace_of(tmp_path / "two" / "run"), trace_of(tmp_path / "one" / "run"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def test_check_says_which_layers_are_compared(
    workshop: Workshop, teacher: TeacherProcess, sidecar: ServiceProcess, tmp_path: Path
) -> None:
    assert train(["check", *arguments(workshop, tmp_path, teacher, sidecar.url)], tmp_path / "log") == 0
    text = (tmp_path / "log").read_text()
    assert "states of the teacher's layer 1, the student's 0" in text and "attention" in text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("distillation.attention.layer=7", "the teacher: attention layer: got 7, the model has layers 0 to 1"),
        ("distillation.attention.relation_heads=24", "does not divide the widths of the student"),
        ("distillation.attention.student_layer=5", "the student: attention layer: got 5, the model has layers 0 to 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(
    workshop: Workshop, teacher: TeacherProcess, sidecar: ServiceProcess, tmp_path: Path, setting: str, message: str
) -> None:
    more = (setting, "distillation.attention.student_layer=0") if "student_layer" not in setting else (setting,)
    assert train(arguments(workshop, tmp_path, teacher, sidecar.url, *more), tmp_path / "log") == 2
    text = (tmp_path / "log").read_text()
    assert message in text and "Traceback" not in text
    assert not steps_of(tmp_path / "run")


def test_a_sidecar_of_other_weights_or_none_at_all_is_refused(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    other = save_tiny_llama(tmp_path / "other" / "model", seed=8)
    with attention_of(other) as wrong:
        assert train(arguments(workshop, tmp_path, teacher, wrong.url), tmp_path / "log") == 2
        dead = wrong.url
    text = (tmp_path / "log").read_text()
    assert "does not hold the teacher's model" in text and "weights" in text
    assert train(arguments(workshop, tmp_path, teacher, dead), tmp_path / "log2") == 75
    text = (tmp_path / "log2").read_text()
    assert "no attention service at" in text and "distillation.attention.coefficient=null" in text
    assert not steps_of(tmp_path / "run")


def test_training_waits_for_a_sidecar_that_died_and_never_goes_on_without(
    workshop: Workshop, teacher: TeacherProcess, model: Path, tmp_path: Path
) -> None:
    with attention_of(model) as sidecar:
        port = sidecar.port
        more = ("run.steps=400", "prefetch.depth=1", "teacher.log_every_s=0.5", "teacher.deadline_s=1")
        command = arguments(workshop, tmp_path, teacher, sidecar.url, *more)
        with TrainerProcess(command, tmp_path / "log") as trainer:
            wait_for_step(tmp_path / "run", 2, trainer)
            sidecar.signal(signal.SIGKILL)
            sidecar.wait()
            wait_until(lambda: "no attention states" in trainer.text, trainer)
            stood = steps_of(tmp_path / "run")[-1]
            with attention_of(model, port=port):
                wait_for_step(tmp_path / "run", stood + 3, trainer)
                trainer.signal(signal.SIGTERM)
                assert trainer.wait() == 75
    assert all(line["weighted/attention"] > 0 for line in lines_of(tmp_path / "run"))
    assert "training is waiting" in (tmp_path / "log").read_text()


def test_training_stops_where_the_sidecar_stays_away_or_comes_back_as_another(
    workshop: Workshop, teacher: TeacherProcess, model: Path, tmp_path: Path
) -> None:
    other = save_tiny_llama(tmp_path / "other" / "model", seed=8)
    for name, back, code, message in (
        ("away", None, 75, "no attention service at teacher.attention_url for"),
        ("another", other, 2, "is not the expected teacher"),
    ):
        with attention_of(model) as sidecar:
            more = ("run.steps=400", f"run.id={name}", "prefetch.depth=1", "teacher.deadline_s=1")
            patience = ("teacher.outage_timeout_s=4",) if back is None else ()
            command = arguments(workshop, tmp_path, teacher, sidecar.url, *more, *patience)
            with TrainerProcess(command, tmp_path / f"{name}.log") as trainer:
                wait_for_step(tmp_path / name, 2, trainer)
                sidecar.signal(signal.SIGKILL)
                sidecar.wait()
                if back is None:
                    assert trainer.wait() == code
                else:
                    with attention_of(back, port=sidecar.port):
                        assert trainer.wait() == code
        assert message in (tmp_path / f"{name}.log").read_text(), (tmp_path / f"{name}.log").read_text()
        assert all(line["weighted/attention"] > 0 for line in lines_of(tmp_path / name))
