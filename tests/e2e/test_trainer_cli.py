"""`stillhouse-train` through the front door: it learns from the real service, and says in one line what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from student_trainer import main
from tests.teacher_process import TeacherProcess, free_port
from tests.trainer_run import Workshop, lines_of, steps_of, teacher_script, trace_of, train

COMMAND = str(Path(sys.executable).parent / "stillhouse-train")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=200, env=os.environ | environment
    )


def test_the_command_trains_and_leaves_its_figures(workshop: Workshop, teacher: TeacherProcess, tmp_path: Path) -> None:
    arguments = workshop.settings(tmp_path, "evaluation.every=6", "logging.wandb=auto", url=teacher.url)
    done = command(*arguments, WANDB_API_KEY="")
    assert done.returncode == 0, done.stderr
    assert "WANDB_API_KEY is not set" in done.stderr and "Traceback" not in done.stderr
    assert steps_of(tmp_path / "run") == list(range(1, 13))
    assert [line["step"] for line in lines_of(tmp_path / "run", "evaluation.jsonl")] == [0, 6, 12]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000012"
    assert "checkpoint_path" in (tmp_path / "run" / "settings.yaml").read_text()


def test_help_answers_and_nothing_at_all_shows_it() -> None:
    shown = command("--help")
    assert shown.returncode == 0 and "optim.learning_rate" in shown.stdout
    assert command().returncode == 2


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    """`stillhouse-train --help | head -1`, with a reader that is gone before the first byte."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([COMMAND, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


Refused = Callable[..., str]


@pytest.fixture()
def refused(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """What the command says where it can't run: one line, no traceback, exit code 2 or `expected`. In this process."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    threads = torch.get_num_threads()

    def run(*overrides: str, url: str | None = None, expected: int = 2) -> str:
        capfd.readouterr()
        code = main.run(workshop.settings(tmp_path / "runs", *overrides, url=url))
        torch.set_num_threads(threads)
        text = capfd.readouterr().err
        assert code == expected, text
        assert "Traceback" not in text
        said = [line for line in text.splitlines() if line.startswith("stillhouse-train: ")]
        assert len(said) == 1, text
        assert steps_of(tmp_path / "runs" / "run") == []
        return said[0]

    return run


def test_no_teacher_at_the_url(refused: Refused) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    said = refused(url=url, expected=75)
    assert url in said and "stillhouse-teacher" in said and "teacher.url" in said


def test_something_else_at_the_url(teacher: TeacherProcess, refused: Refused) -> None:
    assert "/elsewhere" in refused(url=f"{teacher.url}/elsewhere", expected=75)
    assert "http://" in refused(url="ftp://x")


def test_a_misspelt_setting(teacher: TeacherProcess, refused: Refused) -> None:
    assert "'optim.learning_rate'" in refused("optim.lerning_rate=1", url=teacher.url)


def test_a_missing_data_file(teacher: TeacherProcess, refused: Refused) -> None:
    said = refused("data.sources.a.path=/no/such/file.jsonl", url=teacher.url)
    assert "/no/such/file.jsonl" in said


def test_a_missing_student(teacher: TeacherProcess, refused: Refused) -> None:
    said = refused("student.checkpoint_path=/no/such/model", url=teacher.url)
    assert "/no/such/model" in said


def test_more_than_the_teacher_serves(teacher: TeacherProcess, refused: Refused) -> None:
    said = refused("teacher.top_k=300", url=teacher.url)
    assert "teacher.top_k is 300" in said and "256" in said
    assert "data.seq_len" in refused("data.seq_len=4000", url=teacher.url)


def test_a_key_that_is_not_known(refused: Refused) -> None:
    with TeacherProcess(script=teacher_script(), keys="alice 0123456789abcdef") as guarded:
        assert "key" in refused(url=guarded.url)


def test_another_tokenizer(refused: Refused) -> None:
    with TeacherProcess(script=teacher_script(identity={"semantic.tokenizer_sha256": "0" * 64})) as other:
        assert "tokenizer" in refused(url=other.url)


def test_a_teacher_off_by_one(refused: Refused) -> None:
    with TeacherProcess(script=teacher_script(shift=1)) as shifted:
        assert "off by one" in refused(url=shifted.url, expected=1)


def test_a_teacher_that_answers_nonsense_stops_the_run(refused: Refused) -> None:
    with TeacherProcess(script=teacher_script(corrupt="nan")) as broken:
        assert "computed a next_logprob that is not finite" in refused(url=broken.url, expected=1)


def test_a_run_does_not_go_on_with_another_teacher(workshop: Workshop, tmp_path: Path) -> None:
    arguments = workshop.settings(tmp_path, "run.allow_changes=[run.steps]")
    with TeacherProcess(script=teacher_script()) as first:
        assert train([*arguments, "run.steps=4", f"teacher.url={first.url}"], tmp_path / "first.txt") == 0
    before = trace_of(tmp_path / "run")
    with TeacherProcess(script=teacher_script(identity={"semantic.dtype": "bfloat16"})) as second:
        assert train([*arguments, "run.steps=8", f"teacher.url={second.url}"], tmp_path / "second.txt") == 2
    said = (tmp_path / "second.txt").read_text()
    assert "semantic.dtype: expected float32, got bfloat16" in said and "Traceback" not in said
    assert trace_of(tmp_path / "run") == before


def test_a_numeric_change_of_the_teacher_is_warned_of(workshop: Workshop, tmp_path: Path) -> None:
    arguments = workshop.settings(tmp_path, "run.allow_changes=[run.steps]")
    with TeacherProcess(script=teacher_script()) as first:
        assert train([*arguments, "run.steps=4", f"teacher.url={first.url}"], tmp_path / "first.txt") == 0
    with TeacherProcess(script=teacher_script(identity={"numeric.device": "another"})) as second:
        assert train([*arguments, "run.steps=8", f"teacher.url={second.url}"], tmp_path / "second.txt") == 0
    assert "numeric.device" in (tmp_path / "second.txt").read_text()


def test_a_run_does_not_go_on_with_other_settings(workshop: Workshop, teacher: TeacherProcess, tmp_path: Path) -> None:
    arguments = workshop.settings(tmp_path, "run.steps=4", url=teacher.url)
    assert train(arguments, tmp_path / "first.txt") == 0
    assert train([*arguments, "optim.learning_rate=1"], tmp_path / "second.txt") == 2
    assert "optim.learning_rate: 0.003 in the checkpoint, 1.0 now" in (tmp_path / "second.txt").read_text()


def test_the_key_is_written_nowhere(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-planted-0123456789abcdef"
    with TeacherProcess(script=teacher_script(), keys=f"alice {key}") as guarded:
        done = command(*workshop.settings(tmp_path, "run.steps=4", url=guarded.url), STILLHOUSE_KEY=key)
    assert done.returncode == 0, done.stderr
    assert key not in done.stderr + done.stdout
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes(), path


def test_a_student_that_is_the_teacher_has_nothing_to_learn(workshop: Workshop, tmp_path: Path) -> None:
    """The same weights behind the real service and in the trainer: the loss is rounding at every temperature."""
    terms = [f"distillation.terms.at_{t}.{field}" for t in (1, 2, 5) for field in ("kind=top_k_kl", f"temperature={t}")]
    with TeacherProcess(str(workshop.student), "--engine", "hf", "--dtype", "float32") as teacher:
        arguments = workshop.settings(
            tmp_path, *terms, "distillation.terms.cross_entropy.coefficient=0", "teacher.sanity=off", "run.steps=3",
            "optim.learning_rate=1e-9", "evaluation.every=3", url=teacher.url,
        )  # fmt: skip
        assert train(arguments, tmp_path / "output.txt") == 0, (tmp_path / "output.txt").read_text()
    for line in lines_of(tmp_path / "run"):
        for t in (1, 2, 5):
            assert abs(line[f"loss/at_{t}"]) < 1e-5
    for line in lines_of(tmp_path / "run", "evaluation.jsonl"):
        assert line["a"]["kl"] < 1e-5 and line["a"]["agreement"] > 0.99
