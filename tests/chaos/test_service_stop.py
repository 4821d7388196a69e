"""How a teacher process ends: drained, aborted, with a dead engine, or killed. Real processes, sockets and signals."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import httpx
import msgpack
import psutil
import pytest

from tests.chaos.crowd import ask, crowd, request_body, until_admitted
from tests.teacher_process import TeacherProcess

CLIENTS = 32


@pytest.mark.parametrize("seed", range(5))
async def test_sigterm_under_load_completes_all_that_was_accepted(seed: int) -> None:
    wait = random.Random(seed).uniform(0.0, 1.0)
    with TeacherProcess("--drain-time", "10", script={"delay_s": 0.4}) as teacher:
        children = psutil.Process(teacher.pid).children(recursive=True)
        load = asyncio.create_task(
            crowd(teacher.url, CLIENTS, lambda n: request_body(40, seed=n, sequences=3),
                  lambda: teacher.process.poll() is not None)
        )  # fmt: skip
        async with httpx.AsyncClient(base_url=teacher.url) as client:
            await until_admitted(client, CLIENTS // 2)
        await asyncio.sleep(wait)
        told = time.monotonic()
        teacher.signal()
        code = await asyncio.to_thread(teacher.wait)
        took = time.monotonic() - told
        outcomes = await load
        answered = [event for event in teacher.events("request") if event["status"] == 200]
        assert code == 0 and took < 12
        accepted = [outcome for outcome in outcomes if outcome.status == 200]
        assert accepted and all(outcome.whole and outcome.targets == 3 for outcome in accepted)
        assert len(accepted) == len([event for event in answered if event["route"] == "/v1/targets"])
        refused = [outcome for outcome in outcomes if outcome.status not in (0, 200)]
        assert all(outcome.status == 503 and outcome.retry_after for outcome in refused)
        assert not [child for child in children if child.is_running()]


async def test_a_draining_teacher_is_not_ready_and_refuses_newcomers_with_retry_after() -> None:
    with TeacherProcess("--drain-time", "20", script={"delay_s": 2.0}) as teacher:
        async with httpx.AsyncClient(base_url=teacher.url, timeout=30) as client:
            assert (await client.get("/health/ready")).status_code == 200
            accepted = asyncio.create_task(ask(client, request_body(20)))
            await until_admitted(client, 1)
            teacher.signal()
            await asyncio.sleep(0.3)
            ready = await client.get("/health/ready")
            newcomer = await ask(client, request_body(20, seed=1))
            assert ready.status_code == 503 and ready.json()["code"] == "overloaded"
            assert newcomer.status == 503 and newcomer.retry_after
            assert (await client.get("/health/live")).status_code == 200
            assert (await accepted).whole
        assert teacher.wait() == 0


async def test_a_second_signal_answers_503_and_ends_within_two_seconds() -> None:
    with TeacherProcess("--drain-time", "60", script={"delay_s": 30.0}) as teacher:
        async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
            waiting = [asyncio.create_task(ask(client, request_body(20, seed=n))) for n in range(8)]
            await until_admitted(client, 8)
            teacher.signal()
            await asyncio.sleep(0.5)
            assert not any(task.done() for task in waiting)
            told = time.monotonic()
            teacher.signal(signal.SIGINT)
            assert await asyncio.to_thread(teacher.wait) == 1
            assert time.monotonic() - told < 2
            assert {outcome.status for outcome in await asyncio.gather(*waiting)} == {503}


async def test_the_end_of_the_drain_time_aborts_what_is_left() -> None:
    with TeacherProcess("--drain-time", "1", script={"hang_token": 7}) as teacher:
        async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
            hanging = asyncio.create_task(ask(client, request_body(20, seed=3, first=7)))
            await until_admitted(client, 1)
            told = time.monotonic()
            teacher.signal()
            assert await asyncio.to_thread(teacher.wait) == 1
            assert time.monotonic() - told < 3
            assert (await hanging).status == 503


async def test_an_aborted_answer_that_has_begun_says_which_sequences_failed() -> None:
    with TeacherProcess("--drain-time", "1", script={"hang_token": 511}) as teacher:
        body = {"sequences": [[1, 2, 3], [511, 2]], "top_k": 4}
        async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
            asked = asyncio.create_task(
                client.post("/v1/targets", json=body, headers={"Accept": "application/msgpack"})
            )
            await until_admitted(client, 1)
            await asyncio.sleep(0.3)
            teacher.signal()
            response = await asked
        unpacker = msgpack.Unpacker()
        unpacker.feed(response.content)
        messages = list(unpacker)
        assert [message["type"] for message in messages] == ["header", "targets", "error", "end"]
        assert messages[2]["index"] == 1 and messages[2]["code"] == "overloaded" and messages[2]["retryable"]


@pytest.mark.parametrize("cause", [{"die_token": 0}, {"die_after_s": 1.0}])
async def test_a_dead_engine_takes_the_process_down_with_a_reason(cause: dict[str, float]) -> None:
    with TeacherProcess(script={"delay_s": 0.05} | cause) as teacher:
        async with httpx.AsyncClient(base_url=teacher.url, timeout=30) as client:
            before = await ask(client, request_body(20, seed=1))
            died = time.monotonic() + cause.get("die_after_s", 0)
            fatal = None
            if "die_token" in cause:
                fatal = await client.post("/v1/targets", json={"sequences": [[0]]})
            code = await asyncio.to_thread(teacher.wait)
            assert code == 70 and time.monotonic() - died < 10
            assert before.whole
            if fatal is not None:
                assert fatal.status_code == 503 and fatal.json()["code"] == "engine_dead"
        assert "the engine died: the scripted engine is dead" in teacher.log


async def test_no_request_is_answered_200_by_a_dead_engine() -> None:
    with TeacherProcess(script={"delay_s": 0.2, "die_after_s": 1.0}) as teacher:
        born = time.monotonic()
        outcomes = await crowd(
            teacher.url, 8, lambda n: request_body(20, seed=n), lambda: teacher.process.poll() is not None
        )
        assert teacher.wait() == 70
        # A second after it was ready it died; an answer takes 0.2 s of it.
        late = [outcome for outcome in outcomes if outcome.status == 200 and outcome.started - born > 1.2]
        assert outcomes and not late
        assert {outcome.status for outcome in outcomes} <= {0, 200, 503}


async def test_a_client_sees_that_a_killed_teacher_did_not_finish() -> None:
    with TeacherProcess(script={"tokens_per_second": 2000}) as teacher:
        async with httpx.AsyncClient(base_url=teacher.url, timeout=30) as client:
            asked = [asyncio.create_task(ask(client, request_body(200, sequences=20, seed=n))) for n in range(4)]
            await until_admitted(client, 4)
            await asyncio.sleep(1.0)
            teacher.signal(signal.SIGKILL)
            outcomes = await asyncio.gather(*asked)
        assert all(not outcome.whole and outcome.error for outcome in outcomes)
        assert any(outcome.targets for outcome in outcomes)


async def test_a_signal_while_the_model_loads_ends_the_process_at_once() -> None:
    with TeacherProcess(script={"start_s": 60}, port=0, wait=False) as teacher:
        await _until_it_listens(teacher)
        told = time.monotonic()
        teacher.signal()
        assert await asyncio.to_thread(teacher.wait) == 1
        assert time.monotonic() - told < 2


async def test_a_signal_while_a_real_model_loads_does_not_wait_for_it(tiny_llama: Path) -> None:
    with TeacherProcess(str(tiny_llama), "--engine", "hf", wait=False) as teacher:
        await _until_it_listens(teacher)
        teacher.signal()
        assert await asyncio.to_thread(teacher.wait) == 1
        assert "Traceback" not in teacher.log


async def test_a_loading_teacher_lives_and_is_not_ready() -> None:
    with TeacherProcess(script={"start_s": 4}, wait=False) as teacher:
        port = await _until_it_listens(teacher)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            assert (await client.get("/health/live")).status_code == 200
            for path in ("/health/ready", "/v1/teacher"):
                response = await client.get(path)
                said = response.json()
                assert response.status_code == 503 and said["code"] == "loading" and "loading" in said["message"]
                assert int(response.headers["retry-after"]) >= 1
            teacher.wait_ready()
            assert (await client.get("/health/ready")).status_code == 200


async def _until_it_listens(teacher: TeacherProcess) -> int:
    """The port of a teacher that has not said its ready line."""
    async with asyncio.timeout(30):
        while True:
            for connection in psutil.Process(teacher.pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    return connection.laddr.port
            await asyncio.sleep(0.05)
