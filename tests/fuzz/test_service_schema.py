"""The OpenAPI document is true: generated requests, good and bad, meet only documented statuses and bodies."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance

from tests.teacher_process import TeacherProcess

EXAMPLES, EXAMPLES_AT_LENGTH = 40, 1000
KEY = "fuzz-key-0123456789abcdef"


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess("--log-level", "error", keys=f"fuzz {KEY}") as process:
        yield process
        unforeseen = process.events("unforeseen error")
        assert not unforeseen, unforeseen


@pytest.fixture(scope="module")
def api(teacher: TeacherProcess) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{teacher.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})


ROUTES = [
    ("/v1/targets", "POST"), ("/v1/completions", "POST"), ("/generate", "POST"), ("/inference/v1/generate", "POST"),
    ("/v1/teacher", "GET"),
    ("/v1/head", "GET"), ("/v1/models", "GET"), ("/v1/status", "GET"), ("/metrics", "GET"), ("/health/live", "GET"),
    ("/health/ready", "GET"), ("/health", "GET"),
]  # fmt: skip


CASES = [(*route, GenerationMode.POSITIVE) for route in ROUTES]
CASES += [(*route, GenerationMode.NEGATIVE) for route in ROUTES if route[1] == "POST"]
# Not every valid body is acceptable: rows and gather_ids must fit the sequences, and a schema can't say so.
UNSAYABLE = [positive_data_acceptance]


LENIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def meet(api: schemathesis.BaseSchema, path: str, method: str, mode: GenerationMode, data: st.DataObject) -> None:
    case = data.draw(api[path][method].as_strategy(generation_mode=mode))
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, timeout=30, excluded_checks=UNSAYABLE)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
@settings(LENIENT, max_examples=EXAMPLES)
@given(data=st.data())
def test_answers_are_as_documented(
    api: schemathesis.BaseSchema, path: str, method: str, mode: GenerationMode, data: st.DataObject
) -> None:
    meet(api, path, method, mode, data)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), CASES)
@settings(LENIENT, max_examples=EXAMPLES_AT_LENGTH)
@given(data=st.data())
def test_twelve_thousand_answers_are_as_documented(
    api: schemathesis.BaseSchema, path: str, method: str, mode: GenerationMode, data: st.DataObject
) -> None:
    meet(api, path, method, mode, data)


def test_every_route_is_described_and_asks_for_a_key(teacher: TeacherProcess) -> None:
    document = httpx.get(f"{teacher.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert {path for path, _ in ROUTES} == set(document["paths"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert bool(operation.get("security")) == (not path.startswith("/health"))
            assert operation["description"] and "200" in operation["responses"]
