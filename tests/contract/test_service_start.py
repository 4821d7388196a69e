"""The command: one clear line for what a user did wrong, quick help, an environment variable for every option."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from teacher_service.run import engine_options
from teacher_service.settings import PREFIX, TeacherSettings, parse_settings
from tests.teacher_process import READY, TeacherProcess

HEAVY = ("torch", "fastapi", "vllm", "transformers", "uvicorn")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return subprocess.run(
        [sys.executable, "-m", "teacher_service.main", *arguments], capture_output=True, text=True, timeout=120,
        env=inherited | environment, check=False,
    )  # fmt: skip


def test_help_names_every_option_and_imports_nothing_heavy() -> None:
    probe = f"""
import sys, teacher_service.main as main
try:
    main.main(["--help"])
except SystemExit as exit:
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    print("LOADED", loaded, exit.code)
"""
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert "LOADED [] 0" in result.stdout
    for name in TeacherSettings.model_fields:
        if name != "model":
            assert f"--{name.replace('_', '-')}" in result.stdout


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": ((), "model is missing"),
    "a misspelt option": (("scripted", "--engine", "scripted", "--prot", "1"), "--prot"),
    "an unknown engine": (("m", "--engine", "vlm"), "--engine"),
    "a port beyond all ports": (("m", "--port", "70000"), "--port"),
    "a script for another engine": (("m", "--engine", "hf", "--script", '{"delay_s": 1}'), "--script"),
    "a script that is not JSON": (("s", "--engine", "scripted", "--script", "{"), "--script"),
    "a misspelt script": (("s", "--engine", "scripted", "--script", '{"delays": 1}'), "delays"),
    "an address of somebody else": (("s", "--engine", "scripted", "--host", "192.0.2.1"), "192.0.2.1"),
    "keys that are not there": (("s", "--engine", "scripted", "--port", "0", "--keys", "nowhere"), "nowhere"),
    "a model that is not there": (("./no-such-folder", "--engine", "hf", "--port", "0"), "no-such-folder"),
    "an option that the engine has not": (("m", "--engine", "hf", "--port", "0", "--devise", "cpu"), "devise"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_users_mistake_is_one_line_and_exit_code_2(name: str) -> None:
    arguments, reason = WRONG[name]
    result = run(*arguments, HF_HUB_OFFLINE="1")
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("{")]
    assert result.returncode == 2 and not result.stdout
    assert len(lines) == 1 and lines[0].startswith("stillhouse-teacher: ") and reason in lines[0]


def test_a_taken_port_is_told_before_the_model_loads() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("s", "--engine", "scripted", "--port", str(port), "--script", '{"start_s": 100}')
    assert result.returncode == 2 and f"127.0.0.1:{port}" in result.stderr and "--port" in result.stderr


def test_the_ready_line_is_all_there_is_on_stdout() -> None:
    with TeacherProcess() as teacher:
        info = httpx.get(f"{teacher.url}/v1/teacher").json()
        assert teacher.fingerprint == info["fingerprint"] and teacher.model == "scripted"
        teacher.signal()
        assert teacher.wait() == 0
        assert teacher.process.stdout is not None and teacher.process.stdout.read() == ""
    assert READY.match("stillhouse-teacher: ready at http://127.0.0.1:1, m, f")


def test_every_option_has_an_environment_variable_that_the_command_line_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model": "m", "host": "::1", "port": "7", "engine": "hf", "revision": "abc", "name": "n",
              "dtype": "float16", "max_model_len": "9", "max_top_k": "3", "engine_args": "--device cpu", "script": "{}",
              "keys": "k", "store": "s", "store_bytes": "2000000",
              "capacity": "5", "window": "6", "keep_time": "7.5", "keep_bytes": "8", "ready_time": "9.5",
              "body_timeout": "1.5", "stall_timeout": "2.5",
              "drain_time": "3.5", "tls_cert": "c", "tls_key": "d", "tls_client_ca": "e", "log_format": "text",
              "log_level": "error"}  # fmt: skip
    assert values.keys() == TeacherSettings.model_fields.keys()
    for name, value in values.items():
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", value)
    settings = parse_settings([])
    for name, value in values.items():
        assert str(getattr(settings, name)) == value
    assert parse_settings(["other", "--port", "8"]).model == "other"
    assert parse_settings(["other", "--port", "8"]).port == 8


def test_options_for_the_engine_are_read_as_json_where_they_are() -> None:
    assert engine_options("--tensor-parallel-size 2 --enforce-eager --no-async-scheduling --x=[1] --name 'a b'") == {
        "tensor_parallel_size": 2, "enforce_eager": True, "async_scheduling": False, "x": [1], "name": "a b",
    }  # fmt: skip
    with pytest.raises(ValueError, match="neither an option"):
        engine_options("stray")
    assert parse_settings(["m", "--tensor-parallel-size", "2"]).engine_args == "--tensor-parallel-size 2"
    with pytest.raises(ValueError, match="put MODEL before"):
        parse_settings(["--tensor-parallel-size", "2", "m"])


def test_json_for_the_engine_comes_through_the_command_line_whole() -> None:
    overrides = {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}
    settings = parse_settings(["m", "--hf-overrides", json.dumps(overrides), "--seed=3", "--enforce-eager"])
    assert engine_options(settings.engine_args) == {"hf_overrides": overrides, "seed": 3, "enforce_eager": True}


def test_logs_are_json_lines_with_the_request_id(tmp_path: Path) -> None:
    with TeacherProcess() as teacher:
        httpx.get(f"{teacher.url}/v1/teacher", headers={"X-Request-Id": "tell-me-apart"})
        deadline = time.monotonic() + 30  # the line comes behind the answer
        while not (events := [event for event in teacher.events("request") if event["request_id"] == "tell-me-apart"]):
            assert time.monotonic() < deadline, teacher.log
            time.sleep(0.05)
        (event,) = events
        assert (event["status"], event["route"], event["method"]) == (200, "/v1/teacher", "GET")
        assert event["seconds"] >= 0 and event["bytes_out"] > 100
