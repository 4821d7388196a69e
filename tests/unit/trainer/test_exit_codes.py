"""With what code the trainer ends: 2 is for what asking again can't mend, and for nothing else."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
import requests
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from student_trainer import loop, main
from student_trainer.checkpoint.files import DamagedError
from student_trainer.cli.export import NotTheSameError
from student_trainer.exit_codes import AGAIN, DONE, FAILED, USAGE
from student_trainer.ranks import RankError
from student_trainer.targets.cached import MissingTargetsError
from student_trainer.targets.guard import NonFiniteError
from teacher_proto.errors import BY_CODE, StillhouseError
from teacher_proto.process.stopping import StopSignals
from tests.docs.markdown import ROOT

# Every error that a service or a client may raise, by its code. A new one must be put here.
OF_A_TEACHER = {
    "internal": FAILED, "bad_request": USAGE, "malformed": USAGE, "unauthorized": USAGE, "not_found": USAGE,
    "wrong_teacher": USAGE, "too_large": USAGE, "unsupported_type": USAGE, "method_not_allowed": USAGE,
    "slow_body": AGAIN, "out_of_range": USAGE, "busy": AGAIN, "quota": AGAIN, "overloaded": AGAIN, "loading": AGAIN,
    "engine_failed": FAILED, "engine_out_of_memory": AGAIN, "engine_dead": AGAIN, "wire": AGAIN, "truncated": AGAIN,
    "checksum": AGAIN, "version": USAGE, "invalid_targets": FAILED, "poison_batch": FAILED, "deadly_request": USAGE,
    "teacher_unavailable": AGAIN,
}  # fmt: skip


def code_for(error: BaseException) -> int:
    """What the command ends with where `error` ends it."""

    def command() -> NoReturn:
        raise error

    return main.guarded(command, StopSignals())


def wrapped(cause: BaseException, hidden: bool = False) -> ValueError:
    """A ValueError as the code makes it of what a library raised; `hidden`: by `from None`."""
    try:
        try:
            raise cause
        except BaseException as inner:
            raise ValueError("cannot be read") from (None if hidden else inner)
    except ValueError as error:
        return error


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_of_a_teacher_has_its_exit_code(code: str) -> None:
    assert code_for(BY_CODE[code]("said by a test")) == OF_A_TEACHER[code]


def test_a_teacher_says_itself_whether_asking_again_helps() -> None:
    assert code_for(StillhouseError("a moment", retryable=True)) == AGAIN


def test_what_must_change_first_is_usage_and_what_broke_is_a_failure() -> None:
    for error in (ValueError("x"), DamagedError("x"), MissingTargetsError("x"), wrapped(FileNotFoundError("data")),
                  wrapped(PermissionError("data")), wrapped(OfflineModeIsEnabled("HF_HUB_OFFLINE is set")),
                  wrapped(KeyError("x"))):  # fmt: skip
        assert code_for(error) == USAGE, repr(error)
    for error in (NonFiniteError("x"), NotTheSameError("x"), OSError(errno.ENOSPC, "x"), RankError("gone"),
                  BrokenPipeError("x"), RuntimeError("ours"), MemoryError(), AssertionError("x")):  # fmt: skip
        assert code_for(error) == FAILED, repr(error)
    # Of SIGTERM and Ctrl-C, of which `stoppable` makes 75; tests/chaos/test_stop.py has it.
    with pytest.raises(StopSignals.Stop):
        code_for(StopSignals.Stop())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_what_to_lower_and_shows_no_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert code_for(error) == FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory" in said and "optim.micro_batch_rows" in said
    assert not caplog.records


AWAY = [
    ConnectionRefusedError("s3"), TimeoutError("s3"), socket.gaierror(-3, "Temporary failure in name resolution"),
    OSError(errno.EHOSTUNREACH, "no route"), OSError(errno.ESTALE, "Stale file handle"), httpx.ConnectError("hub"),
    httpx.ReadTimeout("hub"), requests.exceptions.ConnectionError("hub"), requests.exceptions.ReadTimeout("hub"),
]  # fmt: skip


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("cause", AWAY, ids=lambda cause: type(cause).__name__)
def test_data_and_hubs_that_are_away_are_worth_another_start(cause: Exception, hidden: bool) -> None:
    assert code_for(wrapped(cause, hidden)) == AGAIN
    # The hub's library wraps it once more.
    not_found = LocalEntryNotFoundError("cannot be found here, nor asked for")
    not_found.__cause__ = cause
    assert code_for(wrapped(not_found, hidden)) == AGAIN


@pytest.mark.parametrize(("status", "code"), [(503, AGAIN), (429, AGAIN), (404, USAGE), (401, USAGE)])
def test_a_hub_that_answers_is_taken_at_its_word(status: int, code: int) -> None:
    request = httpx.Request("GET", "http://hub")
    answered = httpx.HTTPStatusError("hub", request=request, response=httpx.Response(status, request=request))
    assert code_for(wrapped(answered)) == code


def test_kubernetes_gives_up_on_usage_alone_and_does_not_count_what_is_to_be_started_again() -> None:
    [job] = [document for document in yaml.safe_load_all((ROOT / "deploy/kubernetes/trainer.yaml").read_text())
             if document["kind"] == "Job"]  # fmt: skip
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert by_code == {USAGE: "FailJob", AGAIN: "Ignore"}
    assert (loop.DONE, loop.STOPPED) == (DONE, AGAIN)


def test_compose_starts_a_trainer_again_however_often() -> None:
    for path in ("docker-compose.yml", "deploy/student.compose.yml"):
        trainer = yaml.safe_load(Path(ROOT / path).read_text())["x-trainer"]
        assert trainer["restart"] == "on-failure"
