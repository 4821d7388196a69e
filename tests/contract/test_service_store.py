"""The store behind the service: asked once, paid for once, over restarts, and byte for byte the same."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import httpx
import msgpack

from tests.teacher_process import TeacherProcess


def post(teacher: TeacherProcess, **fields: Any) -> dict[int, dict[str, Any]]:
    headers = {"Content-Type": "application/msgpack"}
    response = httpx.post(f"{teacher.url}/v1/targets", content=msgpack.packb(fields), headers=headers, timeout=30)
    assert response.status_code == 200, response.text
    unpacker = msgpack.Unpacker()
    unpacker.feed(response.content)
    return {message["index"]: message for message in unpacker if message["type"] == "targets"}


def sources(teacher: TeacherProcess) -> dict[str, int]:
    return httpx.get(f"{teacher.url}/v1/status").json()["sources"]


def until_stored(teacher: TeacherProcess, entries: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        text = httpx.get(f"{teacher.url}/metrics").text
        if f"stillhouse_store_entries {float(entries)}" in text:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {entries} entries after 20 s")


ASK: dict[str, Any] = {"sequences": [[n, 2, 3, 4] for n in range(10)], "top_k": 32, "temperatures": [2.0, 5.0]}


def test_a_second_epoch_costs_the_engine_nothing_and_says_the_same_bytes(tmp_path: Path) -> None:
    with TeacherProcess("--store", str(tmp_path / "targets")) as teacher:
        first = post(teacher, **ASK)
        until_stored(teacher, 10)
        time.sleep(1.5)  # the answers themselves are at hand for a second
        assert post(teacher, **ASK) == first
        assert sources(teacher) == {"engine": 40, "store": 40}
        less = post(teacher, **(ASK | {"top_k": 8, "temperatures": [5.0], "rows": [[1, 3]] * 10}))
        assert sources(teacher) == {"engine": 40, "store": 80}
        for index, message in less.items():
            assert message["start"] == 1 and message["ids"]["shape"] == [2, 8]
            whole = first[index]["lse"]["data"]
            assert message["lse"]["data"] == whole[4:12]
        post(teacher, **(ASK | {"top_k": 64}))
        assert sources(teacher)["engine"] == 80


def test_what_was_answered_is_there_after_a_drain_and_after_a_kill(tmp_path: Path) -> None:
    store = str(tmp_path / "targets")
    with TeacherProcess("--store", store) as teacher:
        first = post(teacher, **ASK)
        teacher.signal()
        assert teacher.wait() == 0
    with TeacherProcess("--store", store) as teacher:
        assert post(teacher, **ASK) == first
        assert sources(teacher) == {"store": 40}
        post(teacher, sequences=[[9, 9, 9]], top_k=4)
        until_stored(teacher, 11)
        teacher.signal(signal.SIGKILL)
        teacher.wait()
    with TeacherProcess("--store", store) as teacher:
        assert post(teacher, **ASK) == first
        post(teacher, sequences=[[9, 9, 9]], top_k=4)
        assert sources(teacher) == {"store": 43}


def test_another_teacher_finds_nothing_of_the_first(tmp_path: Path) -> None:
    store = str(tmp_path / "targets")
    with TeacherProcess("--store", store) as teacher:
        post(teacher, **ASK)
        until_stored(teacher, 10)
    with TeacherProcess("--store", store, script={"identity": {"semantic.revision": "other"}}) as teacher:
        post(teacher, **ASK)
        assert sources(teacher) == {"engine": 40}


def test_what_a_broken_teacher_computes_is_not_kept(tmp_path: Path) -> None:
    with TeacherProcess("--store", str(tmp_path / "targets"), script={"corrupt": "nan"}) as teacher:
        response = httpx.post(f"{teacher.url}/v1/targets", json={"sequences": [[1, 2]], "top_k": 4})
        assert (response.status_code, response.json()["code"]) == (500, "engine_failed")
        time.sleep(1)
        assert "stillhouse_store_entries 0.0" in httpx.get(f"{teacher.url}/metrics").text


def test_a_folder_that_is_no_store_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    with TeacherProcess("--store", str(file), wait=False) as teacher:
        assert teacher.wait() == 2
        lines = [line for line in teacher.log.splitlines() if not line.startswith("{")]
        assert len(lines) == 1 and "file" in lines[0]
