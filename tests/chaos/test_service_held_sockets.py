"""Sockets that their clients never close: the service ends each of them by itself, and keeps none of their bytes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.chaos.crowd import ask, request_body, until_gauge
from tests.chaos.hostile import KEYLESS, Behaviour, Held, hold, never_reads
from tests.teacher_process import TeacherProcess

MIB = 2**20
KEY = "0123456789abcdef"
EACH = 8


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess("--stall-timeout", "3", keys=f"alice {KEY}") as process:
        yield process


def open_connections(teacher: TeacherProcess) -> int:
    there = psutil.Process(teacher.pid).net_connections("tcp")
    return sum(connection.status != psutil.CONN_LISTEN for connection in there)


def resident(teacher: TeacherProcess) -> int:
    return psutil.Process(teacher.pid).memory_info().rss


async def until_closed(teacher: TeacherProcess) -> None:
    async with asyncio.timeout(60):
        while open_connections(teacher):  # noqa: ASYNC110 - another process is polled
            await asyncio.sleep(0.1)


async def held_by(teacher: TeacherProcess, behaviours: list[Behaviour], each: int) -> dict[str, list[float]]:
    """Seconds after which the service ended each; none of the sockets is closed here before all are ended."""
    until = time.monotonic() + 90
    helds = [(behaviour, Held(teacher.host, teacher.port, KEY)) for behaviour in behaviours for _ in range(each)]
    try:
        ends = await asyncio.gather(*(hold(held, behaviour, until) for behaviour, held in helds))
        await until_closed(teacher)
    finally:
        for _, held in helds:
            held.close()
    return {
        behaviour.__name__: [end for (one, _), end in zip(helds, ends, strict=True) if one is behaviour]
        for behaviour in behaviours
    }


async def test_every_socket_without_a_key_is_ended_and_nothing_kept(teacher: TeacherProcess) -> None:
    async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
        for seed in range(50):
            assert (await ask(client, request_body(64, seed=seed), KEY)).whole
    await until_closed(teacher)
    before, most = resident(teacher), 0
    holding = asyncio.create_task(held_by(teacher, KEYLESS, EACH))
    while not holding.done():
        most = max(most, resident(teacher))
        await asyncio.sleep(0.1)
    ends = await holding
    for name, seconds in ends.items():
        print(f"{name}: {EACH} ended after {min(seconds):.1f} to {max(seconds):.1f} s")
    print(f"peak memory + {(most - before) / MIB:.1f} MiB with {EACH * len(KEYLESS)} sockets")
    # 20 s in all by themselves; a busy machine may look late.
    assert all(math.isfinite(end) for seconds in ends.values() for end in seconds)
    assert max(max(seconds) for seconds in ends.values()) < 60
    assert most - before < 10 * MIB


async def test_who_has_a_key_keeps_a_connection_that_strangers_lose(teacher: TeacherProcess) -> None:
    async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
        assert (await ask(client, request_body(16), KEY)).whole
        opened = open_connections(teacher)
        # Longer than a stranger's would live between two requests.
        await asyncio.sleep(10)
        assert open_connections(teacher) == opened == 1
        assert (await ask(client, request_body(16), KEY)).whole
    await until_closed(teacher)


async def test_strangers_are_bounded_in_number_and_do_not_crowd_out_keys(teacher: TeacherProcess) -> None:
    # With more than 512 at a time the oldest that ask nothing go at once, long before a deadline.
    helds = [Held(teacher.host, teacher.port, KEY) for _ in range(700)]
    try:
        for held in helds:
            await held.connect()
        async with asyncio.timeout(30):
            while sum(held.ended for held in helds) < 180:  # noqa: ASYNC110 - another process is polled
                await asyncio.sleep(0.02)
        async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
            for seed in range(5):
                assert (await ask(client, request_body(16, seed=seed), KEY)).whole
    finally:
        for held in helds:
            held.close()
    await until_closed(teacher)


async def test_a_reader_that_stalls_and_stays_is_dropped_with_what_it_was_to_read(teacher: TeacherProcess) -> None:
    levels = []
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=teacher.url, timeout=60, headers=headers) as client:
        for _ in range(3):
            helds = [Held(teacher.host, teacher.port, KEY, receive_buffer=4096) for _ in range(6)]
            until = time.monotonic() + 60
            ends = await asyncio.gather(*(hold(held, never_reads, until, every_s=0.1) for held in helds))
            await until_gauge(client, "admitted_requests", lambda value: value == 0)
            levels.append(resident(teacher))
            print(f"6 readers that take nothing were ended {min(ends):.1f} to {max(ends):.1f} s after they asked; "
                  f"{levels[-1] / MIB:.0f} MiB are resident")  # fmt: skip
            assert all(math.isfinite(end) for end in ends)
            for held in helds:
                held.close()
    # Each round was to read 60 MiB. What the first leaves is the one answer, which stays at hand.
    assert levels[2] - levels[0] < 20 * MIB
