"""A slow teacher and a long queue: what its clients hear, who waits for whom, what is never computed twice."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import httpx
import pytest

from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import WrongTeacherError
from teacher_proto.wire.records import TARGETS_FORMAT
from teacher_proto.wire.responses import ResponseDecoder
from tests.chaos.crowd import Outcome, ask, gauge, percentile, request_body, until_admitted, until_gauge
from tests.chaos.listener import Heard, listen
from tests.teacher_process import TeacherProcess

KEYS = {name: f"{name}-key-0123456789abcdef" for name in ("first", "second", "third", "fourth", "fifth", "new")}
KEYS_FILE = "\n".join(f"{name} {key}" for name, key in KEYS.items())


def clients(teacher: TeacherProcess, key: str | None = None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=teacher.url, headers=headers, timeout=120, limits=limits)


def error_of_estimates(heard: Heard, after_s: float) -> float:
    """The largest error of what the client was told after so many seconds, as a part of the whole time."""
    told = [(at, left) for at, left in heard.estimates() if at >= after_s]
    return max((abs(at + left - heard.seconds) / heard.seconds for at, left in told), default=0.0)


async def test_sixteen_requests_at_a_slow_teacher_are_told_how_long_and_computed_once() -> None:
    # 20 tokens a second and a minute, ten times as fast.
    with TeacherProcess("--window", "256", script={"tokens_per_second": 200}) as teacher:
        async with clients(teacher) as client:
            bodies = [request_body(64, sequences=2, seed=n) for n in range(16)]
            heard = await asyncio.gather(*(listen(client, body) for body in bodies))
            computed = await gauge(client, "engine_tokens_computed")
    assert all(one.whole and sorted(one.answered) == [0, 1] for one in heard)
    assert computed == 16 * 2 * 64
    last = max(heard, key=lambda one: one.seconds)
    wrong = error_of_estimates(last, 6)
    per_second = max(one.bytes_of_progress / one.seconds for one in heard)
    first = max(one.progress[0][0] for one in heard if one.progress)
    print(f"{last.seconds:.1f} s; first word after {first:.1f} s; estimates within {wrong:.0%} after a tenth of a "
          f"minute; {per_second:.0f} bytes/s of progress a request")  # fmt: skip
    assert len(last.progress) >= 5 and first < 4 and wrong < 0.2 and per_second < 100
    for one in heard:
        done = [progress.tokens_done for _, progress in one.progress]
        assert done == sorted(done) and all(progress.tokens == 128 for _, progress in one.progress)


async def test_five_clients_with_a_long_queue_are_all_answered_in_fair_order() -> None:
    # 600 s of work at 20 tokens a second, here 12 s at 1000.
    with TeacherProcess(keys=KEYS_FILE, script={"tokens_per_second": 1000}) as teacher:
        async with clients(teacher) as client, clients(teacher, KEYS["new"]) as sixth:
            names = list(KEYS)[:5]
            # The engine is busy until all five have come, so that none has it to itself for a while.
            busy = asyncio.create_task(listen(sixth, request_body(100, sequences=20, seed=99)))
            while not await gauge(sixth, "engine_tokens"):  # noqa: ASYNC110, another process decides
                await asyncio.sleep(0.02)
            started = time.monotonic()
            asked = [
                listen(client, request_body(100, sequences=24, seed=n), key=KEYS[name]) for n, name in enumerate(names)
            ]
            heard = dict(zip(names, await asyncio.gather(*asked), strict=True))
            took = time.monotonic() - started
            assert (await busy).whole
        async with clients(teacher, KEYS["first"]) as client:
            assert await gauge(client, "engine_tokens_computed") == 20 * 100 + 5 * 24 * 100
    assert all(one.whole and len(one.answered) == 24 for one in heard.values())
    ends = [one.seconds for one in heard.values()]
    wrong = max(error_of_estimates(one, took / 10) for one in heard.values())
    print(f"{took:.1f} s for 14 s of work; ends within {max(ends) - min(ends):.1f} s; estimates within {wrong:.0%}")
    # Fair: nobody is done long before the others.
    assert min(ends) > 0.8 * max(ends) and wrong < 0.25


async def test_a_newcomer_connects_to_a_busy_teacher_at_once() -> None:
    with TeacherProcess("--capacity", str(2**30), keys=KEYS_FILE, script={"tokens_per_second": 200}) as teacher:
        async with clients(teacher, KEYS["first"]) as busy, clients(teacher, KEYS["new"]) as calm:
            body = request_body(1000, sequences=100, seed=1)
            flood = asyncio.create_task(listen(busy, body, every_s=10))
            await until_gauge(calm, "queue_tokens", lambda value: value >= 98_000)
            times = []
            for _ in range(3):
                started = time.monotonic()
                async with TeacherClient(teacher.url, key=KEYS["new"]) as newcomer:
                    await newcomer.teacher()
                    assert newcomer.canary is not None
                times.append(time.monotonic() - started)
            started = time.monotonic()
            for path in ("/health/live", "/health/ready", "/v1/teacher", "/v1/status"):
                assert (await calm.get(path)).status_code == 200, path
            probes = time.monotonic() - started
            connects = ", ".join(f"{seconds:.2f}" for seconds in times)
            print(f"connects in {connects} s with 10^5 tokens queued, four probes in {probes:.2f} s")
            assert max(times) < 2 and probes < 1
            assert await gauge(calm, "queue_tokens") >= 90_000
            flood.cancel()


async def test_canaries_beyond_the_allowance_queue_as_anything_else() -> None:
    with TeacherProcess("--window", "1000", keys=KEYS_FILE, script={"tokens_per_second": 2000}) as teacher:
        async with clients(teacher, KEYS["first"]) as client:
            for _ in range(4):
                async with TeacherClient(teacher.url, key=KEYS["new"]) as newcomer:
                    await newcomer.teacher()
            waiting = asyncio.create_task(listen(client, request_body(500, sequences=20, seed=1)))
            await until_gauge(client, "queue_tokens", lambda value: value >= 5000)
            async with TeacherClient(teacher.url, key=KEYS["new"]) as newcomer:
                await newcomer.teacher()
            # It took its turn beside the other's, and was computed all the same.
            assert (await waiting).whole
            assert await gauge(client, "engine_tokens_computed") == 5 * 80 + 20 * 500


async def test_a_teacher_that_changed_under_its_store_is_caught_at_connect(tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "targets"))
    with TeacherProcess(*store) as teacher:
        async with TeacherClient(teacher.url) as client:
            await client.teacher()
            canary = client.canary
        for _ in range(2):
            async with TeacherClient(teacher.url, expect_canary=canary) as client:
                await client.teacher()
        async with clients(teacher) as http:
            assert await gauge(http, "engine_tokens_computed") == 3 * 80
    with TeacherProcess(*store, script={"noise": 0.5}) as teacher:
        async with TeacherClient(teacher.url, expect_canary=canary) as client:
            with pytest.raises(WrongTeacherError):
                await client.teacher()


async def test_what_was_begun_answers_who_asks_again_and_nothing_is_computed_twice() -> None:
    with TeacherProcess(script={"tokens_per_second": 400}) as teacher:
        async with clients(teacher) as client:
            body = request_body(100, sequences=4, seed=1)
            for _ in range(3):
                hasty = asyncio.create_task(listen(client, body))
                await until_admitted(client, 1)
                await asyncio.sleep(0.3)
                hasty.cancel()
                await until_gauge(client, "admitted_requests", lambda value: value == 0)
            heard = await listen(client, body)
            assert heard.whole and len(heard.answered) == 4
            assert await gauge(client, "engine_tokens_computed") == 400


async def test_what_was_begun_is_stored_though_nobody_waits_for_it(tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "targets"))
    with TeacherProcess(*store, script={"delay_s": 0.5}) as teacher:
        async with clients(teacher) as client:
            hasty = asyncio.create_task(listen(client, request_body(20, seed=1)))
            await until_gauge(client, "engine_tokens", lambda value: value == 20)
            hasty.cancel()
            await until_gauge(client, "store_entries", lambda value: value >= 1)
    with TeacherProcess(*store) as teacher:
        async with clients(teacher) as client:
            assert (await listen(client, request_body(20, seed=1))).whole
            assert await gauge(client, "engine_tokens_computed") == 0


async def test_what_nobody_waits_for_does_not_hold_up_a_drain() -> None:
    with TeacherProcess("--drain-time", "60", script={"delay_s": 600}) as teacher:
        async with clients(teacher) as client:
            hasty = asyncio.create_task(listen(client, request_body(20, seed=1)))
            await until_gauge(client, "engine_tokens", lambda value: value == 20)
            hasty.cancel()
            await until_gauge(client, "admitted_requests", lambda value: value == 0)
            assert await gauge(client, "engine_tokens") == 20
        teacher.signal()
        assert await asyncio.to_thread(teacher.wait) == 0


async def test_failures_after_the_first_word_are_messages_in_the_answer() -> None:
    with TeacherProcess("--window", "256", script={"tokens_per_second": 20, "poison_token": 7}) as teacher:
        async with clients(teacher) as client:
            first = asyncio.create_task(listen(client, request_body(40, seed=1)))
            await until_gauge(client, "engine_tokens", lambda value: value == 40)
            told = asyncio.create_task(listen(client, request_body(250, sequences=2, seed=2, first=7)))
            untold = asyncio.create_task(ask(client, request_body(251, sequences=2, seed=3, first=7)))
            heard, refused = await asyncio.gather(told, untold)
            assert (await first).whole
    assert heard.status == 200 and heard.progress and heard.whole
    assert sorted(heard.failures) == [(0, "engine_failed"), (1, "engine_failed")]
    assert refused.status == 500


async def test_an_abort_after_the_first_word_is_a_message_too() -> None:
    with TeacherProcess("--drain-time", "1", "--capacity", "200", script={"hang_token": 7}) as teacher:
        async with clients(teacher) as client:
            inside = asyncio.create_task(listen(client, request_body(20, seed=1, first=7)))
            await until_admitted(client, 1)
            outside = asyncio.create_task(listen(client, request_body(20, seed=2, first=7)))
            await until_gauge(client, "waiting_requests", lambda value: value == 1)
            await asyncio.sleep(2.5)
            teacher.signal()
            heard, waited = await asyncio.gather(inside, outside)
            assert await asyncio.to_thread(teacher.wait) == 1
    assert heard.progress and heard.failures == [(0, "overloaded")] and heard.whole
    assert [progress.tokens_ahead for _, progress in waited.progress] == [20] * len(waited.progress)
    assert waited.progress and waited.failures == [(None, "overloaded")] and not waited.answered


async def test_a_request_that_needs_an_empty_service_is_let_in_beside_small_ones() -> None:
    # Cost 9 a token: 100 small requests of 20 tokens are in flight, 2 s of work; then one of all that fits comes.
    capacity = 9 * 2000
    with TeacherProcess(
        "--capacity", str(capacity), keys=KEYS_FILE, script={"tokens_per_second": 1000, "vocab_size": 512}
    ) as teacher:
        async with clients(teacher) as client:
            stop = asyncio.Event()
            outcomes: list[Outcome] = []

            async def loop(name: str, number: int) -> None:
                for n in range(10**6):
                    if stop.is_set():
                        return
                    body = request_body(20, seed=10**6 * number + n)
                    outcomes.append(await ask(client, body, KEYS[name]))
                    if outcomes[-1].status != 200:
                        await asyncio.sleep(0.05)

            names = ("first", "second")
            small = [asyncio.create_task(loop(names[n % 2], n)) for n in range(60)]
            async with clients(teacher, KEYS["third"]) as watch:
                await until_gauge(watch, "admitted_cost", lambda value: value >= 0.4 * capacity)
                in_flight = await gauge(watch, "admitted_tokens")
            large = await listen(client, request_body(500, sequences=4, seed=5), key=KEYS["new"])
            stop.set()
            await asyncio.gather(*small)
    assert large.whole and len(large.answered) == 4
    waited = large.seconds - 2.0  # its own 2000 tokens
    print(f"{in_flight:.0f} tokens in flight; waited {waited:.2f} s beyond its own 2 s; "
          f"{sum(o.whole for o in outcomes)} small ones answered")  # fmt: skip
    assert waited < 2 * in_flight / 1000 + 1
    assert {outcome.status for outcome in outcomes} <= {200, 429, 503} and any(o.whole for o in outcomes)


async def test_what_costs_more_than_an_empty_service_lets_in_is_refused_with_what_would_fit() -> None:
    with TeacherProcess("--capacity", "1000", "--max-top-k", "8", script={"max_sequence_length": 16}) as teacher:
        async with clients(teacher) as client:
            most = (await client.get("/v1/teacher")).json()["max_cost"]
            assert most == 16 * (256 + 32 + 1)
            assert (await listen(client, request_body(16, sequences=most // (9 * 16), seed=1))).whole
            refused = await ask(client, request_body(16, sequences=256, seed=1, kinds=["hidden"]))
    assert refused.status == 422 and b'"limit": %d' % most in refused.body


async def test_retry_after_says_how_long_before_anything_has_finished() -> None:
    with TeacherProcess("--capacity", str(9 * 600), script={"tokens_per_second": 20}) as teacher:
        async with clients(teacher) as client:
            inside = asyncio.create_task(ask(client, request_body(600, seed=1)))
            await until_admitted(client, 1)
            await asyncio.sleep(2)
            refused = await ask(client, request_body(50, seed=2))
            assert await gauge(client, "tokens_per_second") == 0
            inside.cancel()
    # 2 s are over and none of it is done: it will take that long again at least.
    assert refused.status == 503 and refused.retry_after is not None and refused.retry_after >= 2


async def test_a_slow_engine_is_ready_and_a_stuck_one_is_not() -> None:
    with TeacherProcess("--ready-time", "3", script={"tokens_per_second": 100, "stuck_token": 7}) as teacher:
        async with clients(teacher) as client:
            # One job of 8 s is silent for longer than the ready time; a probe shows that the engine is only slow.
            slow = asyncio.create_task(ask(client, request_body(800, seed=1)))
            await until_gauge(client, "engine_tokens", lambda value: value == 800)
            seen = []
            while not slow.done():
                seen.append((await client.get("/health/ready")).status_code)
                await asyncio.sleep(0.1)
            assert (await slow).whole and set(seen) == {200}, seen
            stuck = asyncio.create_task(ask(client, request_body(20, seed=2, first=7)))
            await until_gauge(client, "engine_tokens", lambda value: value == 20)
            started = time.monotonic()
            while (await client.get("/health/ready")).status_code == 200:  # noqa: ASYNC110 - another process is polled
                await asyncio.sleep(0.05)
            took = time.monotonic() - started
            print(f"{len(seen)} probes of a slow engine, all ready; a stuck one is not after {took:.1f} s")
            assert took < 3 + 5
            assert (await client.get("/health/live")).status_code == 200
            stuck.cancel()


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "0"])
async def test_an_interval_that_is_none_is_refused(value: str) -> None:
    with TeacherProcess() as teacher:
        async with clients(teacher) as client:
            response = await client.post("/v1/targets", json={"sequences": [[1]]}, headers={"X-Progress": value})
    assert response.status_code == 400 and response.json()["field"] == "X-Progress"


async def test_large_bodies_of_one_client_leave_room_for_others() -> None:
    size = 16 * 2**20
    with TeacherProcess("--body-timeout", "20", keys=KEYS_FILE) as teacher:
        async with clients(teacher, KEYS["new"]) as client:

            async def p99() -> float:
                outcomes = [await ask(client, request_body(16, seed=n)) for n in range(50)]
                assert all(outcome.whole for outcome in outcomes)
                return percentile([outcome.seconds for outcome in outcomes], 0.99)

            calm = await p99()
            head = (
                f"POST /v1/targets HTTP/1.1\r\nHost: teacher\r\nContent-Type: application/msgpack\r\n"
                f"Authorization: Bearer {KEYS['first']}\r\nContent-Length: {size}\r\n\r\n"
            ).encode()
            sockets = [await asyncio.open_connection(teacher.host, teacher.port) for _ in range(16)]
            for _, writer in sockets:
                writer.write(head + bytes(2**16))
            # All of the 256 MiB are asked for; half of them are one client's share.
            answers = [asyncio.create_task(reader.readline()) for reader, _ in sockets]
            async with asyncio.timeout(20):
                while sum(answer.done() for answer in answers) < 8:  # noqa: ASYNC110 - another process is polled
                    await asyncio.sleep(0.01)
            busy = await p99()
            print(f"p99 of another client {1000 * calm:.1f} ms calm, {1000 * busy:.1f} ms beside 16 bodies of 16 MiB")
            refused = [answer.result() for answer in answers if answer.done()]
            assert len(refused) == 8 and all(b" 429 " in line for line in refused)
            for answer in answers:
                answer.cancel()
            for _, writer in sockets:
                writer.transport.abort()
            # What they held is free again.
            async with asyncio.timeout(20):
                while (await _large(teacher, head, size)) == 429:  # noqa: ASYNC110 - another process is polled
                    await asyncio.sleep(0.1)


async def _large(teacher: TeacherProcess, head: bytes, size: int) -> int:
    """The status that a whole body of nothing gets: 429 where there is no room for it."""
    reader, writer = await asyncio.open_connection(teacher.host, teacher.port)
    writer.write(head + bytes(size))
    status = int((await reader.readline()).split()[1])
    writer.transport.abort()
    return status


async def test_a_slow_reader_gets_its_answer_whole() -> None:
    with TeacherProcess("--stall-timeout", "1", script={"max_sequence_length": 16_384}) as teacher:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        listener.connect((teacher.host, teacher.port))
        listener.setblocking(False)
        body = request_body(16_384, top_k=256)
        head = f"POST /v1/targets HTTP/1.0\r\nContent-Type: application/msgpack\r\nContent-Length: {len(body)}\r\n\r\n"
        loop, received, started = asyncio.get_running_loop(), bytearray(), 0.0
        await loop.sock_sendall(listener, head.encode() + body)
        # 16 MiB in one message, at 4 MiB a second.
        while piece := await loop.sock_recv(listener, 2**19):
            started = started or time.monotonic()
            received += piece
            await asyncio.sleep(len(piece) / 2**22)
        took = time.monotonic() - started
        listener.close()
    answer = _without_chunks(bytes(received).partition(b"\r\n\r\n")[2])
    decoder = ResponseDecoder(TARGETS_FORMAT)
    assert [type(message).__name__ for message in decoder.feed(answer)] == ["Header", "Targets", "End"]
    decoder.close()
    print(f"{len(answer) / 2**20:.1f} MiB read in {took:.1f} s, with a stall time of 1 s")
    assert took > 2


def _without_chunks(body: bytes) -> bytes:
    parts, start = [], 0
    while size := int(body[start : (end := body.index(b"\r\n", start))], 16):
        parts.append(body[end + 2 : end + 2 + size])
        start = end + 2 + size + 2
    return b"".join(parts)
