"""Secrets given to a run are in nothing that it writes: planted in every place that takes one, then searched for."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import yaml

from student_trainer.cli.compose import compose
from student_trainer.main import start_logging
from student_trainer.settings.redact import HIDDEN, RedactingFormatter, public, redact
from teacher_proto.process.stages import DISPLAY, stage
from tests.teacher_process import TeacherProcess, free_port
from tests.trainer_run import Workshop, steps_of, train

# By the way that it comes in.
PLANTED = {
    "option": "planted-6fd1c1-option",
    "nested": "planted-6fd1c1-nested",
    "variable": "planted-6fd1c1-variable",
    "teacher": "planted-6fd1c1-teacher",
    "dead teacher": "planted-6fd1c1-dead",
    "proxy": "planted-6fd1c1-proxy",
    "key": "planted-6fd1c1-key",
    "tracker": "planted-6fd1c1-tracker",
}


def plant(arguments: list[str]) -> None:
    sys.argv = ["stillhouse-train", *arguments]  # as trackers find it
    os.environ |= {
        "PLANTED_OPTION": PLANTED["variable"], "STILLHOUSE_KEY": PLANTED["key"], "WANDB_MODE": "offline",
        "HTTPS_PROXY": f"http://proxy-user:{PLANTED['proxy']}@127.0.0.1:9", "NO_PROXY": "127.0.0.1,localhost",
        "WANDB_API_KEY": PLANTED["tracker"].ljust(40, "0"),
    }  # fmt: skip


def found_in(folder: Path) -> dict[str, list[str]]:
    """By planted secret, the files with it."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files
    found = {what: [str(path) for path, data in files.items() if secret.encode() in data]
             for what, secret in PLANTED.items()}  # fmt: skip
    return {what: paths for what, paths in found.items() if paths}


def settings_of(workshop: Workshop, root: Path, teacher_url: str) -> list[str]:
    with_password = teacher_url.replace("://", f"://alice:{PLANTED['teacher']}@")
    nobody = f"http://bob:{PLANTED['dead teacher']}@127.0.0.1:{free_port()}"
    return workshop.settings(
        root, f"teacher.url=[{with_password},{nobody}]", f"checkpoint.url=file://{root}/copies",
        f"checkpoint.storage_options.secret={PLANTED['option']}",
        f"checkpoint.storage_options.client_kwargs.aws_session_token={PLANTED['nested']}",
        "checkpoint.storage_options.connection_string=${oc.env:PLANTED_OPTION}",
        "checkpoint.storage_options.endpoint_url=http://127.0.0.1:1", "checkpoint.storage_options.auto_mkdir=true",
        "logging.wandb=offline", "logging.tensorboard=true", "logging.prometheus_port=0", "evaluation.every=6",
    )  # fmt: skip


def test_nothing_that_a_run_writes_or_says_holds_a_secret(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    given = settings_of(workshop, tmp_path, teacher.url)
    log = tmp_path / "log.txt"
    planting = partial(plant, given)
    assert train([*given, "run.steps=8", "run.allow_changes=run.steps"], log, prelude=planting) == 0, log.read_text()
    # A resumed run compares its settings with the checkpoint's: secrets in them are the same to it.
    assert train([*given, "run.allow_changes=run.steps"], log, prelude=planting) == 0, log.read_text()
    assert steps_of(tmp_path / "run")[-1] == 12 and "uploaded step-00000012" in log.read_text()
    run = str(tmp_path / "run")
    assert train(["export", run, "--format", "hf"], log, prelude=planting) == 0
    assert train(["report", run], log, prelude=planting) == 0
    there = {path.name for path in tmp_path.rglob("*")}
    assert {"settings.yaml", "state.json", "README.md", "run-run.wandb", "tensorboard", "report.html"} <= there
    assert found_in(tmp_path) == {}
    kept = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["checkpoint"]["storage_options"]
    assert kept["secret"] == kept["connection_string"] == kept["client_kwargs"]["aws_session_token"] == HIDDEN
    assert kept["endpoint_url"] == "http://127.0.0.1:1" and kept["auto_mkdir"] is True


def test_what_ends_a_run_is_said_without_secrets(workshop: Workshop, tmp_path: Path) -> None:
    port = free_port()
    nobody = f"teacher.url=http://bob:{PLANTED['dead teacher']}@127.0.0.1:{port}"
    store = f"checkpoint.url=http://bob:{PLANTED['teacher']}@127.0.0.1:{port}/copies"
    data = f"data.sources.a.path=s3://bob:{PLANTED['option']}@bucket/a.jsonl"
    for name, given in (("teacher", [nobody]), ("store", [nobody, store]), ("data", [nobody, data])):
        log = tmp_path / name
        assert train(workshop.settings(tmp_path / "runs", *given), log, prelude=partial(plant, given)) != 0
        assert "stillhouse-train:" in log.read_text()
    assert found_in(tmp_path) == {}


TEXTS = [
    ("http://alice:opensesame@host:8000 is silent", f"http://{HIDDEN}@host:8000 is silent"),
    ("https://ghp_abc123@host/x", f"https://{HIDDEN}@host/x"),
    (
        "s3://bucket/a.jsonl?X-Amz-Signature=0f3e&versionId=7",
        f"s3://bucket/a.jsonl?X-Amz-Signature={HIDDEN}&versionId=7",
    ),
    ("hf://datasets/name@main/data.jsonl", "hf://datasets/name@main/data.jsonl"),
    (
        "checkpoint.storage_options.secret=abc is none",
        f"checkpoint.storage_options.secret={HIDDEN} is none",
    ),
    ("max_batch_tokens=4096, key: value, user@host", "max_batch_tokens=4096, key: value, user@host"),
]


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_a_text_is_shown_without_what_is_secret_in_it(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_variable_that_ends_with_a_line_break_hides_its_secret_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_KEY", "planted-88bb\n")
    assert redact("illegal header b'Bearer planted-88bb\\n'") == f"illegal header b'Bearer {HIDDEN}\\n'"


@pytest.mark.parametrize("secret", ["/K7MDENGbPxRfiCYplanted", "~planted88bb", "/" + "planted" * 99])
def test_a_secret_that_begins_as_a_path_does_is_hidden(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert redact(f"refused: {secret}!") == f"refused: {HIDDEN}!"


def test_the_path_of_a_key_s_file_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key.pem").touch()
    monkeypatch.setenv("STILLHOUSE_TLS_KEY", str(tmp_path / "key.pem"))
    assert redact(f"cannot read {tmp_path}/key.pem") == f"cannot read {tmp_path}/key.pem"


def test_a_traceback_in_the_log_is_redacted_too(workshop: Workshop, tmp_path: Path) -> None:
    compose(workshop.settings(tmp_path, "checkpoint.storage_options.connection_string=AccountPlanted77aa"))
    try:
        raise RuntimeError("cannot log in with AccountPlanted77aa")
    except RuntimeError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, (type(error), error, error.__traceback__))
    text = RedactingFormatter("%(message)s").format(record)
    assert "RuntimeError" in text and "AccountPlanted" not in text and HIDDEN in text


def test_what_a_stage_says_while_it_takes_long_is_redacted_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    start_logging()
    url = f"http://bob:{PLANTED['teacher']}@host"
    with stage(f"looking in {url}", note=lambda: f"{url} is silent", first_s=0.0) as looking:
        assert PLANTED["teacher"] not in looking.line() and HIDDEN in looking.line()
        assert f"http://{HIDDEN}@host is silent" in looking.line()
    DISPLAY.print("done")
    assert PLANTED["teacher"] not in capfd.readouterr().err


def test_settings_without_secrets_are_written_as_they_are(workshop: Workshop, tmp_path: Path) -> None:
    settings = compose(workshop.settings(tmp_path, url="http://teacher:8000"))
    assert public(settings) == settings.model_dump(mode="json")
