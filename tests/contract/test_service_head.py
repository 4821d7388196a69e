"""`GET /v1/head` of a real teacher: whole, in parts, over a network that breaks, and never on a disk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.numpy import load

from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.client.teacher_client import TeacherClient
from tests.proxy import Fault, FaultyProxy
from tests.teacher_process import TeacherProcess

VOCAB = 20_000
QUICK = RetryPolicy(backoff_base_s=0.01, backoff_cap_s=0.05, probe_cap_s=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[TeacherProcess]:
    with TeacherProcess(script={"vocab_size": VOCAB}, environment={"TMPDIR": str(folder)}) as process:
        yield process


@pytest.fixture(scope="module")
def whole(teacher: TeacherProcess) -> httpx.Response:
    return httpx.get(teacher.url + "/v1/head")


def test_the_head_is_whole_and_tells_its_checksum(teacher: TeacherProcess, whole: httpx.Response, folder: Path) -> None:
    assert whole.status_code == 200 and load(whole.content)["weight"].shape[0] == VOCAB
    digest = base64.b64encode(hashlib.sha256(whole.content).digest()).decode()
    assert whole.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert whole.headers["x-teacher-fingerprint"] == teacher.fingerprint
    assert list(folder.iterdir()) == []


def test_a_part_is_given_and_what_is_no_part_of_it_is_the_whole(teacher: TeacherProcess, whole: httpx.Response) -> None:
    size, etag = len(whole.content), whole.headers["etag"]

    def ask(asked: str, **headers: str) -> httpx.Response:
        return httpx.get(teacher.url + "/v1/head", headers={"Range": asked} | headers)

    for asked, start, stop in (("bytes=100-", 100, size), ("bytes=5-1048600", 5, 1_048_601), ("bytes=0-0", 0, 1)):
        part = ask(asked, **{"If-Range": etag})
        assert (part.status_code, part.headers["content-range"]) == (206, f"bytes {start}-{stop - 1}/{size}")
        assert part.content == whole.content[start:stop]
    for asked, headers in (
        (f"bytes={size}-", {}), ("bytes=9-3", {}), ("bytes=-5", {}), ("bytes=0-1,4-5", {}), ("pages=1-2", {}),
        ("bytes=100-", {"If-Range": '"another"'}),
    ):  # fmt: skip
        answer = ask(asked, **headers)
        assert answer.status_code == 200 and answer.content == whole.content


async def test_a_transfer_that_breaks_goes_on_where_it_was(teacher: TeacherProcess, whole: httpx.Response) -> None:
    # Every connection ends after less than half of the file.
    with FaultyProxy(teacher.port, Fault("reset", len(whole.content) // 2)) as proxy:
        async with TeacherClient(proxy.url, policy=QUICK) as client:
            await client.teacher(wait_s=60)
            assert await client.head() == whole.content
        print(f"{proxy.hits} connections were broken")
        assert proxy.hits >= 2
