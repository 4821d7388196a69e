"""docs/api.md is true: every request in it is made, every answer in it comes, and no route is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.teacher_process import AttentionProcess, TeacherProcess
from tests.unit.attention_service.models import save_tiny

TEXT = (Path(__file__).parents[2] / "docs/api.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```\n```(json|text)\n(.*?)```", TEXT, re.DOTALL)
ANY = "…"


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess() as process:
        yield process


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttentionProcess]:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")
    with AttentionProcess(folder, "--layer", "2") as process:
        yield process


def matches(told: Any, came: Any) -> bool:
    """Whether what came is what the page tells, with its `…` for anything."""
    if told == ANY:
        return True
    if isinstance(told, dict) and isinstance(came, dict):
        return told.keys() == came.keys() and all(matches(told[name], came[name]) for name in told)
    if isinstance(told, list) and isinstance(came, list):
        return len(told) == len(came) and all(map(matches, told, came))
    return told == came


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_gives_the_answer_beside_it(
    teacher: TeacherProcess, attention: AttentionProcess, number: int
) -> None:
    language, request, form, answer = BLOCKS[number]
    source = request.replace("http://localhost:8000", teacher.url).replace("http://localhost:8001", attention.url)
    command = ["bash", "-c", source] if language == "sh" else [sys.executable, "-c", source]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    if form == "json":
        assert matches(json.loads(answer), json.loads(output)), output
    else:
        assert output == answer


def test_the_attention_services_own_routes_have_examples(attention: AttentionProcess) -> None:
    paths = set(httpx.get(f"{attention.url}/openapi.json").json()["paths"])
    shown = {path for _, request, _, _ in BLOCKS for path in re.findall(r"localhost:800[01](/[a-z0-9/._]*)", request)}
    assert paths - shown == set()


def test_every_route_has_an_example(teacher: TeacherProcess) -> None:
    paths = httpx.get(f"{teacher.url}/openapi.json").json()["paths"]
    shown = {path for _, request, _, _ in BLOCKS for path in re.findall(r"localhost:8000(/[a-z0-9/._]*)", request)}
    assert shown == set(paths)
    for path, operations in paths.items():
        for method in operations:
            assert f"{method.upper()} {path}" in TEXT


def test_every_code_that_the_page_lists_has_its_status(teacher: TeacherProcess) -> None:
    from teacher_proto.errors import BY_CODE

    listed = re.findall(r"^\| (\d{3}) \| (.*?) \|", TEXT, re.MULTILINE)
    for status, codes in listed:
        for code in re.findall(r"`(\w+)`", codes):
            assert BY_CODE[code].status == int(status)
    assert len(listed) == 12
