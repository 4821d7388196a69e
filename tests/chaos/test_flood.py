"""A flood of hostile sockets beside two clients with keys, who must not notice: a short one here, ten minutes as slow.

STILLHOUSE_FLOOD_SECONDS=600 pytest -m slow tests/chaos/test_flood.py -s
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict

import httpx
import psutil
import pytest

from tests.chaos.crowd import Crowd, Outcome, crowd_process, percentile, request_body
from tests.chaos.hostile import Flood
from tests.teacher_process import TeacherProcess

MIB = 2**20
KEYS = {"alice": "alice-0123456789abcdef", "bob": "bob-0123456789abcdef", "mallory": "mallory-0123456789abcdef"}


async def clients(teacher: TeacherProcess, seconds: float, seed: int) -> list[Outcome]:
    """Two clients that ask now and then; no two requests are alike."""
    both = [
        Crowd(
            teacher.url, clients=1, seconds=seconds, key=KEYS[name], seed=seed + number, tokens=200, asks_every_s=0.02
        )
        for number, name in enumerate(("alice", "bob"))
    ]
    return [outcome for outcomes in await asyncio.gather(*map(crowd_process, both)) for outcome in outcomes]


async def flood_process(flood: Flood) -> dict[str, int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.hostile", json.dumps(asdict(flood)), stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    return json.loads(out)


async def fill_recent_answers(teacher: TeacherProcess) -> None:
    """64 MiB of answers stay at hand; they are there before memory is looked at."""
    headers = {"Content-Type": "application/msgpack", "Authorization": f"Bearer {KEYS['alice']}"}
    async with httpx.AsyncClient(base_url=teacher.url, timeout=120, headers=headers) as client:
        for seed in range(6):
            body = request_body(1024, sequences=8, top_k=256, seed=10**6 + seed)
            assert (await client.post("/v1/targets", content=body)).status_code == 200


async def hold_out(seconds: float, each: int, quiet_s: float) -> tuple[float, float]:
    """p99 of the clients' requests, quiet and in the flood; everything else is asserted here."""
    with TeacherProcess("--stall-timeout", "10", keys="\n".join(f"{n} {k}" for n, k in KEYS.items())) as teacher:
        process = psutil.Process(teacher.pid)
        await fill_recent_answers(teacher)
        quiet = await clients(teacher, quiet_s, seed=1)
        descriptors, before = process.num_fds(), process.memory_info().rss
        flood = Flood(teacher.host, teacher.port, KEYS["mallory"], each, seconds)
        flooding = asyncio.create_task(flood_process(flood))
        asking = asyncio.create_task(clients(teacher, seconds, seed=3))
        most_memory = most_descriptors = 0
        while not flooding.done():
            most_memory = max(most_memory, process.memory_info().rss)
            most_descriptors = max(most_descriptors, process.num_fds())
            await asyncio.sleep(0.2)
        opened, ended = await flooding, time.monotonic()
        busy = await asking
        async with asyncio.timeout(120):
            while process.num_fds() > descriptors:  # noqa: ASYNC110 - another process is looked at
                await asyncio.sleep(0.1)
        back_s = time.monotonic() - ended
    p99_quiet, p99_busy = (percentile([one.seconds for one in them], 0.99) for them in (quiet, busy))
    p50_quiet, p50_busy = (percentile([one.seconds for one in them], 0.5) for them in (quiet, busy))
    print(f"{seconds:g} s, {sum(opened.values())} hostile sockets, {most_descriptors} descriptors at most, back to "
          f"{descriptors} after {back_s:.1f} s; memory + {(most_memory - before) / MIB:.1f} MiB; {len(quiet)} and "
          f"{len(busy)} requests, p50 {1000 * p50_quiet:.1f} and {1000 * p50_busy:.1f} ms, p99 {1000 * p99_quiet:.1f} "
          f"and {1000 * p99_busy:.1f} ms")  # fmt: skip
    print(opened)
    assert len(busy) > 20 and all(outcome.whole for outcome in busy)
    assert most_memory - before < 50 * MIB
    assert back_s < 60
    return p99_quiet, p99_busy


async def test_clients_do_not_notice_a_short_flood() -> None:
    quiet, busy = await hold_out(seconds=12, each=4, quiet_s=4)
    # The flood's own work shares the processor with the service here; a second is far from any deadline.
    assert busy < max(2 * quiet, 1.0)


@pytest.mark.slow
async def test_clients_do_not_notice_ten_minutes_of_flood() -> None:
    seconds = float(os.environ.get("STILLHOUSE_FLOOD_SECONDS", "600"))
    quiet, busy = await hold_out(seconds, each=12, quiet_s=60)
    assert busy < max(2 * quiet, 0.1)
