"""Backoff, budget, circuit breaker and rendezvous order, each by itself."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from teacher_proto.client.replicas import Replica as PoolReplica
from teacher_proto.client.replicas import ReplicaPool, RetryBudget, RetryPolicy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import OverloadedError, StillhouseError, TeacherUnavailableError
from teacher_proto.requests import TargetsRequest
from tests.unit.proto.fake_teacher import FakeClock, Replica, network, problem, refuse, respond, sequences

REQUEST = TargetsRequest(sequences=tuple(sequences(5, 9)), top_k=4)
POLICY = RetryPolicy()


def test_backoff_is_full_jitter_from_a_quarter_to_ten_seconds() -> None:
    timing = FakeClock().timing()
    for attempt, cap in ((0, 0.25), (1, 0.5), (3, 2.0), (5, 8.0), (6, 10.0), (500, 10.0)):
        delays = [timing.full_jitter(attempt, 0.25, 10.0) for _ in range(2000)]
        assert 0 <= min(delays) < 0.05 * cap and 0.95 * cap < max(delays) <= cap
        assert abs(sum(delays) / len(delays) - cap / 2) < 0.03 * cap


def test_budget_allows_its_floor_then_a_tenth_of_the_calls_of_a_minute() -> None:
    clock = FakeClock()
    budget = RetryBudget(POLICY, clock.timing())
    assert [budget.wait_s() for _ in range(10)] == [0.0] * 10
    assert 0 < budget.wait_s() <= 60
    for _ in range(200):
        budget.note_call()
    assert [budget.wait_s() for _ in range(10)] == [0.0] * 10
    assert budget.wait_s() > 0
    clock.time += 59
    assert budget.wait_s() == pytest.approx(1)
    clock.time += 1
    assert [budget.wait_s() == 0 for _ in range(11)] == [True] * 10 + [False]


def test_a_budget_of_nothing_never_allows() -> None:
    budget = RetryBudget(RetryPolicy(budget_floor=0), FakeClock().timing())
    assert budget.wait_s() == 60


async def test_repeats_to_one_replica_keep_to_the_budget() -> None:
    teacher, clock = Replica(), FakeClock()
    urls = [teacher.url]
    async with TeacherClient(urls, transport=network(teacher), timing=clock.timing()) as client:
        await client.teacher()
        times: list[float] = []

        def busy(_: httpx.Request) -> httpx.Response:
            times.append(clock.time)
            return problem(503, "overloaded")

        teacher.faults += [busy] * 1000
        calls = [client.targets(REQUEST, deadline_s=300) for _ in range(8)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, TeacherUnavailableError) for outcome in outcomes)
        assert client.stats.budget_waits > 0
        for at in times:
            assert sum(at <= other < at + 60 for other in times) <= 8 + 10


async def test_circuit_opens_after_three_failures_and_closes_after_teacher_and_canary() -> None:
    teacher, clock = Replica(), FakeClock()
    log: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        log.append(request.url.path)
        return teacher.handle(request)

    async with TeacherClient(teacher.url, transport=httpx.MockTransport(handle), timing=clock.timing()) as client:
        await client.teacher()
        log.clear()
        teacher.faults += [refuse(httpx.ReadError("reset"))] * 3
        await client.targets(REQUEST)
    assert log.count("/v1/status") == 3, "each cut is looked into: did the engine die?"
    asked = [path for path in log if path != "/v1/status"]
    assert asked == ["/v1/targets"] * 3 + ["/v1/teacher", "/v1/targets", "/v1/targets"]
    assert teacher.canaries == 2 and len(teacher.posts) == 4


async def test_one_silence_opens_the_circuit_since_each_costs_a_read_timeout() -> None:
    one, two, clock = Replica("t0"), Replica("t1"), FakeClock()
    urls = [one.url, two.url]
    async with TeacherClient(urls, transport=network(one, two), timing=clock.timing()) as client:
        await client.targets(REQUEST)
        first, second = (one, two) if one.posts else (two, one)
        first.down = httpx.ReadTimeout("hangs")
        for _ in range(20):
            await client.targets(REQUEST)
        assert len(second.posts) == 20 and client.stats.errors["teacher_unavailable"] == 1


async def test_failures_that_are_not_in_a_row_open_nothing() -> None:
    teacher = Replica()
    async with TeacherClient(teacher.url, transport=network(teacher), timing=FakeClock().timing()) as client:
        for _ in range(5):
            teacher.faults += [refuse(httpx.ReadError("reset"))] * 2
            await client.targets(REQUEST)
        assert client.stats.probes == 1


async def test_a_busy_teacher_is_not_a_broken_one() -> None:
    teacher = Replica()
    async with TeacherClient(teacher.url, transport=network(teacher), timing=FakeClock().timing()) as client:
        teacher.faults += [respond(problem(503, "overloaded", retry_after=1))] * 6
        await client.targets(REQUEST)
        assert client.stats.probes == 1 and client.stats.errors["overloaded"] == 6


async def test_a_strange_retry_after_does_not_keep_a_probe_from_a_teacher_for_long() -> None:
    teacher, clock = Replica(), FakeClock()

    def handle(request: httpx.Request) -> httpx.Response:
        """A proxy's page for maintenance, then the teacher."""
        return teacher.handle(request) if clock.time > 1030 else httpx.Response(503, headers={"retry-after": "86400"})

    async with TeacherClient(teacher.url, transport=httpx.MockTransport(handle), timing=clock.timing()) as client:
        await client.targets(REQUEST)
        assert clock.time <= 1062


async def test_those_who_wait_for_a_dead_teacher_send_one_probe_for_all() -> None:
    teacher, clock = Replica(), FakeClock()
    teacher.down = httpx.ConnectError("gone")
    async with TeacherClient(teacher.url, transport=network(teacher), timing=clock.timing()) as client:
        calls = [client.targets(REQUEST, deadline_s=60) for _ in range(20)]
        await asyncio.gather(*calls, return_exceptions=True)
        assert 30 <= client.stats.probes <= 130, "about one a second, at most every two seconds at the cap"
        assert client.stats.attempts == 0


def pool_of(count: int) -> ReplicaPool:
    async def probe(_: PoolReplica) -> None:
        return None

    return ReplicaPool([f"http://t{i}" for i in range(count)], probe, POLICY, FakeClock().timing())


def test_rendezvous_gives_each_request_its_replica_and_each_replica_its_share() -> None:
    keys = [str(i).encode() for i in range(3000)]
    four, three = pool_of(4), pool_of(3)
    first = {key: four.ranked(key)[0].url for key in keys}
    assert {key: pool_of(4).ranked(key)[0].url for key in keys} == first
    assert all(650 < n < 850 for n in Counter(first.values()).values())
    moved = [key for key in keys if first[key] != three.ranked(key)[0].url]
    assert all(first[key] == "http://t3" for key in moved), "only the share of the replica that left moves"


async def test_a_busy_replica_is_left_alone_and_others_are_asked() -> None:
    pool = pool_of(2)
    await pool.probe_all()
    one, two = pool.replicas
    pool.busy(one, OverloadedError("full", retry_after=5), 0)
    assert await pool.acquire([one, two], set(), deadline=2000) is two
    assert await pool.acquire([one, two], {two}, deadline=2000) is two, "waiting is worse than a second try elsewhere"


async def test_replicas_not_tried_come_before_those_that_were() -> None:
    pool = pool_of(3)
    await pool.probe_all()
    one, two, three = pool.replicas
    assert await pool.acquire([one, two, three], {one}, deadline=2000) is two
    assert await pool.acquire([one, two, three], {one, two, three}, deadline=2000) is one


async def test_a_probe_that_waits_does_not_hold_up_other_replicas() -> None:
    hangs = asyncio.Event()

    async def probe(replica: PoolReplica) -> None:
        if replica.url.endswith("t0"):
            await hangs.wait()

    pool = ReplicaPool(["http://t0", "http://t1"], probe, POLICY, FakeClock().timing())
    replica = await asyncio.wait_for(pool.acquire(pool.replicas, set(), deadline=2000), 5)
    assert replica.url == "http://t1"
    await pool.close()


async def test_the_last_word_of_each_replica_is_told() -> None:
    async def probe(replica: PoolReplica) -> None:
        raise StillhouseError(f"{replica.url} has hiccups", retryable=True)

    pool = ReplicaPool(["http://t0", "http://t1"], probe, POLICY, FakeClock().timing())
    with pytest.raises(TeacherUnavailableError, match=r"http://t0 has hiccups; http://t1 has hiccups"):
        await pool.acquire(pool.replicas, set(), deadline=1005)
