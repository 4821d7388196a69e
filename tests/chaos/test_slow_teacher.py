"""Clients of a real teacher that is slow, small, or dies of one request: nothing times out, nothing is computed twice,
everybody is told how long it takes, and the one request is named.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.client.waiting import Waiting
from teacher_proto.requests import TargetsRequest
from tests.teacher_process import TeacherProcess, free_port
from tests.trainer_run import TrainerProcess, Workshop, teacher_script

RATE = 100.0
# Shorter than any of the runs takes: only progress keeps a client waiting.
IMPATIENT = RetryPolicy(read_timeout_s=4.0, deadline_s=4.0)
NAMES = ("ann", "ben", "cat", "dan", "eve")
KEYS = {name: f"{name}-0123456789abcdef" for name in NAMES}


def requests_of(seed: int, count: int, length: int) -> list[TargetsRequest]:
    draw = np.random.default_rng(seed)
    return [TargetsRequest(sequences=(draw.integers(0, 512, length),), top_k=4) for _ in range(count)]


def totals(teacher: TeacherProcess, key: str | None = None) -> dict[str, float]:
    """Counters of the service, summed over clients: tokens by source, and sequences that were aborted."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    sums: dict[str, float] = {"engine": 0, "coalesced": 0, "store": 0, "aborted": 0}
    for line in httpx.get(teacher.url + "/metrics", headers=headers).text.splitlines():
        if match := re.match(r'stillhouse_tokens_total\{.*source="(\w+)".*\} (\S+)', line):
            sums[match[1]] = sums.get(match[1], 0) + float(match[2])
        if match := re.match(r"stillhouse_engine_aborted_total\{.*\} (\S+)", line):
            sums["aborted"] += float(match[1])
    return sums


async def watch(client: TeacherClient, seen: list[tuple[float, Waiting]]) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(0.25)
        if (waiting := client.waiting()) is not None:
            seen.append((time.monotonic() - started, waiting))


async def ask_all(
    client: TeacherClient, requests: list[TargetsRequest], together: asyncio.Barrier | None = None
) -> tuple[float, list[tuple[float, Waiting]]]:
    """Ask all at once, when all that are `together` have connected; the seconds it took, and what `waiting` said
    meanwhile."""
    await client.teacher()
    if together is not None:
        await together.wait()
    seen: list[tuple[float, Waiting]] = []
    watcher = asyncio.create_task(watch(client, seen))
    started = time.monotonic()
    await asyncio.gather(*(client.targets(request) for request in requests))
    took_s = time.monotonic() - started
    watcher.cancel()
    assert not client.stats.errors and client.stats.attempts == len(requests)
    return took_s, seen


def check_estimates(took_s: float, seen: list[tuple[float, Waiting]]) -> None:
    """After a quarter of the time, what is said to be left comes true."""
    errors = [
        abs(at + left_s - took_s) / took_s
        for at, waiting in seen
        if at > took_s / 4 and (left_s := waiting.seconds_left) is not None
    ]
    print(f"{took_s:.1f} s; off by {np.median(errors):.0%} in the middle, {max(errors):.0%} at most")
    assert len(errors) >= 8 and np.median(errors) < 0.2 and max(errors) < 0.5
    done = [waiting.tokens_done for _, waiting in seen]
    assert done == sorted(done) and done[-1] > done[0]


async def test_sixteen_requests_of_a_slow_teacher_take_their_time_and_are_computed_once() -> None:
    requests = requests_of(0, 16, 60)
    with TeacherProcess(script={"tokens_per_second": RATE}) as teacher:
        async with TeacherClient(teacher.url, policy=IMPATIENT) as client:
            took_s, seen = await ask_all(client, requests)
        sums = totals(teacher)
    assert took_s > 2 * IMPATIENT.deadline_s
    check_estimates(took_s, seen)
    # Beside the requests there is a canary of 80 tokens.
    assert sums["aborted"] == sums["coalesced"] == 0 and 960 <= sums["engine"] <= 960 + 80


async def test_five_clients_share_a_slow_teacher_and_nobody_times_out() -> None:
    keys = "\n".join(f"{name} {key}" for name, key in KEYS.items())
    with TeacherProcess(script={"tokens_per_second": 2 * RATE}, keys=keys) as teacher:
        clients = {name: TeacherClient(teacher.url, key=key, policy=IMPATIENT) for name, key in KEYS.items()}
        asked = {name: requests_of(seed, 8, 50) for seed, name in enumerate(NAMES)}
        together = asyncio.Barrier(len(NAMES))
        results = await asyncio.gather(*(ask_all(clients[name], asked[name], together) for name in NAMES))
        for client in clients.values():
            await client.close()
        sums = totals(teacher, KEYS["ann"])
    for took_s, seen in results:
        check_estimates(took_s, seen)
    times = [took_s for took_s, _ in results]
    assert min(times) > 0.6 * max(times), "whoever comes first is not served first, all are served side by side"
    assert sums["aborted"] == sums["coalesced"] == 0 and 2000 <= sums["engine"] <= 2000 + 5 * 80


async def test_a_newcomer_connects_while_a_hundred_long_requests_wait() -> None:
    """Neither the teacher's queue nor a client's own connections are in the way of a probe."""
    patient = RetryPolicy(max_in_flight=100)
    with TeacherProcess(script={"tokens_per_second": 200.0}) as teacher:
        async with TeacherClient(teacher.url, policy=patient) as busy, TeacherClient(teacher.url) as newcomer:
            await busy.teacher()
            calls = [asyncio.create_task(busy.targets(request)) for request in requests_of(1, 100, 1000)]
            await asyncio.sleep(2.0)
            waiting = busy.waiting()
            assert waiting is not None and waiting.tokens == 100_000 and waiting.tokens_done < 2_000
            started = time.monotonic()
            await newcomer.teacher()
            newcomer_s = time.monotonic() - started
            replica = busy._pool.replicas[0]
            busy._pool.open(replica)
            started = time.monotonic()
            await busy._pool.probe_all()
            own_s = time.monotonic() - started
            assert not replica.is_open
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
    print(f"a newcomer connects in {newcomer_s:.2f} s, the busy client itself again in {own_s:.2f} s")
    assert max(newcomer_s, own_s) < 5


async def test_a_request_of_more_than_a_body_holds_is_answered_in_parts() -> None:
    """Gathered ids of 40 sequences take 21 MB, and the service reads 16."""
    draw = np.random.default_rng(0)
    sequences = tuple(draw.integers(0, 512, 512) for _ in range(40))
    ids = tuple(draw.integers(0, 512, (512, 256)) for _ in range(40))
    request = TargetsRequest(sequences=sequences, kinds=("gather", "hidden"), gather_ids=ids)
    with TeacherProcess() as teacher:
        async with TeacherClient(teacher.url) as client:
            answers = await client.targets(request)
            assert not client.stats.errors and client.stats.attempts >= 2
    assert [answer.num_rows for answer in answers] == [512] * 40


@contextmanager
def restarted(port: int, **script: object) -> Iterator[list[TeacherProcess]]:
    """A teacher that is started again whenever it ends, as compose does; all that have been, in order."""
    started = [TeacherProcess(script=teacher_script(**script), port=port)]
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            if started[-1].process.poll() is not None:
                started.append(TeacherProcess(script=teacher_script(**script), port=port))
            over.wait(0.05)

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield started
    finally:
        over.set()
        keeper.join()
        for teacher in started:
            teacher.stop()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def test_a_document_that_kills_the_engine_is_named_and_the_run_stops(workshop: Workshop, tmp_path: Path) -> None:
    """It stands in the middle of source a, with a token that no other document has."""
    deadly, paths = 7, {}
    for name, source in workshop.sources.items():
        documents = [json.loads(line)["input_ids"] for line in source.read_text().splitlines()]
        documents = [[token if token != deadly else 8 for token in document] for document in documents]
        if name == "a":
            victim = next(document for document in documents[60:] if len(document) > 12)
            victim[5] = deadly
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in documents))
    port = free_port()
    arguments = workshop.settings(
        tmp_path, "run.steps=400", "prefetch.depth=2", "data.held_out_rows=1",
        *(f"data.sources.{name}.path={path}" for name, path in paths.items()), "teacher.sanity=off",
        "teacher.save_after_s=600", url=f"http://127.0.0.1:{port}",
    )  # fmt: skip
    with (
        restarted(port, die_token=deadly, delay_s=0.01) as teachers,
        TrainerProcess(arguments, tmp_path / "output.txt") as trainer,
    ):
        code = trainer.wait(timeout_s=300)
        deaths = sum(teacher.process.poll() is not None for teacher in teachers)
    print(f"{deaths} deaths, exit {code}")
    assert code == 2, trainer.text
    # The first in company, two alone: two restarts until the run stops.
    assert deaths <= 3 and len(teachers) <= 4
    assert re.search(r"document a:\d+.*the engine dies on one sequence of \d+ tokens", trainer.text), trainer.text
    assert ", ".join(map(str, victim[:6])) in trainer.text
    assert list((tmp_path / "run" / "dumps").glob("batch-*/batch.safetensors"))
