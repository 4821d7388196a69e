"""Keys: 401 on every route but the probes, whatever the trick, and no key in any log, error or description."""

from __future__ import annotations

import base64
import hashlib
import hmac
import inspect
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute

import serving.http.keys
from serving.http.keys import Keys, presented_key, require_client
from teacher_proto.errors import UnauthorizedError
from teacher_service.app import create_app
from teacher_service.engines.scripted import ScriptedEngine
from teacher_service.service import TeacherService
from teacher_service.settings import TeacherSettings
from tests.teacher_process import TeacherProcess

ALICE, BOB = "alice-key-0123456789abcdef", "bob-key-0123456789abcdef"
KEYS = f"alice {ALICE}\nbob sha256:{hashlib.sha256(BOB.encode()).hexdigest()}  # by digest\n"
OPEN = {"/health/live", "/health/ready", "/health"}
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess(keys=KEYS) as process:
        yield process


def routes() -> list[APIRoute]:
    service = TeacherService(ScriptedEngine(), TeacherSettings(model="scripted", engine="scripted"))
    found = create_app(service).routes
    assert all(isinstance(route, APIRoute) for route in found), "a route that takes no dependency is open to all"
    return [route for route in found if isinstance(route, APIRoute)]


def raw(teacher: TeacherProcess, text: str) -> int:
    """The status of one raw request, 0 if the connection just ends."""
    with socket.create_connection((teacher.host, teacher.port), timeout=10) as connection:
        connection.sendall(text.encode("latin-1"))
        head = connection.recv(65_536)
    return int(head.split()[1]) if head else 0


def test_every_route_but_the_probes_depends_on_the_key() -> None:
    checked = 0
    for route in routes():
        calls = [dependency.call for dependency in route.dependant.dependencies]
        assert (require_client in calls) == (route.path not in OPEN), route.path
        checked += 1
    assert checked >= 6


@pytest.mark.parametrize("method", METHODS)
def test_no_method_and_no_trick_gets_past_the_door(teacher: TeacherProcess, method: str) -> None:
    let_in, tried = [], 0
    for route in routes():
        if route.path in OPEN:
            continue
        path = route.path.replace("{", "").replace("}", "")
        spellings = [path, f"/{path}", path.replace("v1", "%76%31"), f"{path}?key={ALICE}", f"/health/live/..{path}",
                     f"{path}%2e", f"{path}/", f"{path};/health/live", path.upper(), f"http://x/health/live{path}",
                     f"{path}#/health/live"]  # fmt: skip
        hosts = ["teacher", "x/health/live?", "localhost/health/live#", "x:80/health", ""]
        headers = ["", "Authorization: Bearer \r\n", "Authorization: Bearer wrong\r\n", f"Authorization: {ALICE}\r\n",
                   f"Authorization: Bearer {ALICE[:-1]}\r\n", f"Authorization: Bearer {ALICE}x\r\n",
                   f"Authorization: Bearer {ALICE.upper()}\r\n", f"X-Api-Key: {ALICE}\r\n", f"Cookie: key={ALICE}\r\n",
                   "Authorization: Basic !!!\r\n", "X-Original-URL: /health/live\r\n",
                   f"Authorization: Bearer sha256:{hashlib.sha256(ALICE.encode()).hexdigest()}\r\n"]  # fmt: skip
        for spelling in spellings:
            for host in hosts:
                status = raw(teacher, f"{method} {spelling} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n")
                tried += 1
                if status not in (400, 401, 404, 405):
                    let_in.append((method, spelling, host, status))
        for header in headers:
            status = raw(teacher, f"{method} {path} HTTP/1.1\r\nHost: teacher\r\n{header}Content-Length: 0\r\n\r\n")
            tried += 1
            expected = {401} if method in route.methods else {400, 401, 405}
            if status not in expected:
                let_in.append((method, path, header, status))
    assert tried > 200 and not let_in


def test_a_good_key_opens_as_bearer_and_as_password_of_basic(teacher: TeacherProcess) -> None:
    basic = base64.b64encode(f"anything:{BOB}".encode()).decode()
    for header in (f"Bearer {ALICE}", f"bearer {BOB}", f"Basic {basic}"):
        assert httpx.get(f"{teacher.url}/v1/teacher", headers={"Authorization": header}).status_code == 200
    refused = httpx.get(f"{teacher.url}/v1/teacher")
    assert refused.status_code == 401 and refused.json()["field"] == "Authorization"
    assert "Basic" in refused.headers["www-authenticate"]
    for path in ("/health/live", "/health/ready"):
        assert httpx.get(teacher.url + path).status_code == 200


def test_a_refused_request_is_refused_before_its_body_is_read(teacher: TeacherProcess) -> None:
    huge = "POST /v1/targets HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 99999999999\r\n\r\n"
    assert raw(teacher, huge) == 401


def test_clients_are_counted_by_the_name_of_their_key(teacher: TeacherProcess) -> None:
    for key, number in ((ALICE, 2), (BOB, 3)):
        for last in range(number):
            body = {"sequences": [[number] * 9 + [last]], "top_k": 2}
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.post(f"{teacher.url}/v1/targets", json=body, headers=headers).status_code == 200
    text = httpx.get(f"{teacher.url}/metrics", headers={"Authorization": f"Bearer {ALICE}"}).text
    for name, tokens in (("alice", 20), ("bob", 30)):
        assert f'stillhouse_tokens_total{{client="{name}",source="engine"}} {tokens}.0' in text


def test_keys_take_effect_when_their_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {ALICE}\n")
    with TeacherProcess("--keys", str(file)) as teacher:

        def status(key: str) -> int:
            return httpx.get(f"{teacher.url}/v1/teacher", headers={"Authorization": f"Bearer {key}"}).status_code

        assert (status(ALICE), status(BOB)) == (200, 401)
        file.write_text("this is no keys file, and the old keys stay\n")
        deadline = time.monotonic() + 20
        while not teacher.events("not reloaded, the old one stays") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (status(ALICE), status(BOB)) == (200, 401)
        file.write_text(f"bob {BOB}\n")
        while status(BOB) != 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (status(ALICE), status(BOB)) == (401, 200)


@pytest.mark.parametrize(
    "text", ["", "# nobody\n", "alice\n", "alice short\n", f"alice {ALICE} {BOB}\n", f"al/ice {ALICE}\n",
             f"alice {ALICE}\nalice {BOB}\n", "alice sha256:12\n", f"anonymous {ALICE}\n", f"alice ä{ALICE}\n"],
)  # fmt: skip
def test_a_bad_keys_file_stops_the_start_and_its_keys_are_not_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match=str(file)) as caught:
        Keys(file)
    assert ALICE not in str(caught.value) and BOB not in str(caught.value)


def test_only_digests_are_kept_and_compared_in_constant_time(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEYS)
    keys = Keys(file)
    assert ALICE not in repr(vars(keys)) and ALICE not in repr(keys)
    assert keys.client(ALICE) == "alice" and keys.client(BOB) == "bob"
    source = inspect.getsource(serving.http.keys)
    assert "compare_digest" in source and serving.http.keys.hmac is hmac
    with pytest.raises(UnauthorizedError):
        keys.client(ALICE[:-1])


def test_a_right_beginning_takes_no_longer_than_a_wrong_one(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEYS)
    keys = Keys(file)
    near, far = ALICE[:-1] + "X", "X" * len(ALICE)
    times: dict[str, list[int]] = {near: [], far: []}
    generator = np.random.default_rng(0)
    for index in generator.permutation(np.repeat([0, 1], 10_000)):
        guess = (near, far)[index]
        started = time.perf_counter_ns()
        with _Refused():
            keys.client(guess)
        times[guess].append(time.perf_counter_ns() - started)
    medians = [float(np.median(times[guess])) for guess in (near, far)]
    spread = float(np.std(times[far]) / 100)
    print(f"median of 10^4 refusals: {medians[0]:.0f} ns with all but the last character right, {medians[1]:.0f} ns "
          f"with none; standard error {spread:.0f} ns")  # fmt: skip
    # Not decisive about time, which a busy machine bends, but an early exit would show as hundreds of nanoseconds.
    assert abs(medians[0] - medians[1]) < 0.2 * medians[1]


class _Refused:
    """A lighter `pytest.raises`, so that it does not hide what is timed."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        return kind is UnauthorizedError


def test_headers_that_hold_no_key() -> None:
    for header in (None, "", "Bearer", "Bearer ", "Digest abc", "Basic !!", "Basic", "Basic " + "YTo="):
        assert presented_key(header) is None


def test_no_key_in_logs_errors_metrics_or_pages(teacher: TeacherProcess) -> None:
    planted = "planted-secret-0123456789"
    texts = []
    with httpx.Client(base_url=teacher.url) as client:
        for header in (f"Bearer {planted}", f"Bearer {ALICE}"):
            for path in ("/v1/teacher", f"/v1/teacher?key={planted}", "/metrics", "/openapi.json", f"/{planted}x"):
                response = client.get(path, headers={"Authorization": header})
                texts.append(response.text.replace(f"/{planted}x", "") + repr(response.headers))
            body = {"sequences": [[1]], "fingerprint": None, planted: 1} if planted in header else {"sequences": [[-1]]}
            texts.append(client.post("/v1/targets", json=body, headers={"Authorization": header}).text)
    everything = "\n".join([*texts, teacher.log])
    assert planted not in everything and ALICE not in everything and BOB not in everything
