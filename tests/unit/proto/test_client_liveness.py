"""`TeacherClient` and teachers that are slow, small or mortal: what is kept, split, waited for, and named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.client.waiting import Waiting
from teacher_proto.errors import DeadlyRequestError, OutOfRangeError, TeacherUnavailableError, TooLargeError
from teacher_proto.requests import Limits, TargetsRequest
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.responses import PROGRESS_HEADER, Progress, encode_progress
from tests.unit.proto.fake_teacher import (
    VOCAB,
    FakeClock,
    Replica,
    network,
    problem,
    refuse,
    respond,
    same_bits,
    sequences,
    spoil_body,
    truth,
)

LENGTHS = (5, 9, 30, 12)
REQUEST = TargetsRequest(sequences=tuple(sequences(*LENGTHS)), top_k=8)


def client_of(*replicas: Replica, clock: FakeClock, **arguments: Any) -> TeacherClient:
    urls = [replica.url for replica in replicas]
    return TeacherClient(urls, transport=network(*replicas), timing=clock.timing(), **arguments)


def check_true(answers: list[TokenTargets], request: TargetsRequest = REQUEST) -> None:
    assert len(answers) == len(request.sequences)
    assert all(same_bits(answer, truth(request, i)) for i, answer in enumerate(answers))


def lengths_asked(teacher: Replica) -> list[list[int]]:
    return [[len(tokens_T) for tokens_T in post.sequences] for post in teacher.posts]


class Slowly(httpx.AsyncByteStream):
    """A body with `reports` in it, one every two seconds of the clock, after its first message and before the rest."""

    def __init__(self, body: bytes, reports: Iterator[Progress], clock: FakeClock):
        self._body, self._reports, self._clock = body, reports, clock

    async def __aiter__(self) -> AsyncIterator[bytes]:
        header = self._body.index(b"\xa4type\xa7targets") - 1
        yield self._body[:header]
        for report in self._reports:
            self._clock.time += 2
            await asyncio.sleep(0)
            yield encode_progress(report)
        yield self._body[header:]


def report(teacher: Replica, clock: FakeClock, reports: Iterator[Progress]) -> Callable[[httpx.Request], Any]:
    def fault(http: httpx.Request) -> httpx.Response:
        assert float(http.headers[PROGRESS_HEADER]) <= 2
        body = teacher.answer(http, teacher.posts[-1]).content
        return httpx.Response(200, headers={"content-type": "application/msgpack"}, stream=Slowly(body, reports, clock))

    return fault


async def test_whoever_reports_progress_is_never_given_up() -> None:
    teacher, clock = Replica(), FakeClock()
    heard: list[Waiting] = []
    async with client_of(teacher, clock=clock, policy=RetryPolicy(deadline_s=10)) as client:
        await client.teacher()
        # First a queue that gets shorter, for ten minutes.
        teacher.faults.append(report(teacher, clock, (Progress(0, 56, 600 - n, 1.0) for n in range(300))))
        check_true(await client.targets(REQUEST, on_progress=heard.append))
    assert clock.time >= 1600 and client.stats.attempts == 1 and not client.stats.errors
    assert heard[0] == Waiting(heard[0].what, 0, 56, 600, 1.0, 0.0)
    assert [w.tokens_ahead for w in heard[:300]] == [600 - n for n in range(300)]
    assert [w.tokens_done for w in heard[300:]] == [12, 42, 51, 56] and heard[-1].seconds_left == 0


async def test_a_report_that_nothing_moves_is_no_progress() -> None:
    teacher, clock = Replica(), FakeClock()
    stuck = report(teacher, clock, (Progress(0, 56, 100, 20.0) for _ in range(10_000)))
    async with client_of(teacher, clock=clock, policy=RetryPolicy(deadline_s=10)) as client:
        await client.teacher()
        teacher.faults.append(stuck)
        with pytest.raises(TeacherUnavailableError, match="10 s without progress"):
            await client.targets(REQUEST)
    # The longest sequence has 30 tokens: twice their 1.5 s are allowed on top, and reports come every 2 s.
    assert 10 <= clock.time - 1000 <= 10 + 3 + 4


async def test_silence_of_an_old_teacher_is_answered_with_smaller_requests() -> None:
    """One that computes 14 tokens within the read timeout, and says nothing until it is done."""
    teacher, clock = Replica(), FakeClock()

    def too_slow(http: httpx.Request) -> Any:
        if teacher.posts[-1].num_tokens > 14 * http.extensions["timeout"]["read"] / 60:
            clock.time += http.extensions["timeout"]["read"]
            raise httpx.ReadTimeout("silence")
        return None

    async with client_of(teacher, clock=clock) as client:
        teacher.faults += [too_slow] * 20
        given: dict[int, TokenTargets] = {}
        with pytest.raises(TeacherUnavailableError, match="without progress"):
            await client.targets(REQUEST, given=given, deadline_s=130)
        check_true(await client.targets(REQUEST, given=given, deadline_s=400))
    # 30 tokens alone take three times as long as it may be silent at first; what was learnt outlives a call.
    assert lengths_asked(teacher) == [[5, 9, 30, 12], [5, 9], [30], [30], [30], [12]]


async def test_what_has_come_is_kept_when_the_deadline_ends_a_call() -> None:
    teacher, clock = Replica(), FakeClock()
    given: dict[int, TokenTargets] = {}

    def cut_and_leave(http: httpx.Request) -> Any:
        teacher.down = httpx.ConnectError("gone")
        marks = [at for at in range(10_000) if teacher.answer(http, teacher.posts[-1]).content[at : at + 13] == MARK]
        return {"body": lambda body: body[: marks[2] - 1]}

    async with client_of(teacher, clock=clock) as client:
        await client.teacher()
        teacher.faults.append(cut_and_leave)
        with pytest.raises(TeacherUnavailableError):
            await client.targets(REQUEST, given=given, deadline_s=20)
        assert sorted(given) == [2, 3], "the fake answers the last sequence first"
        teacher.down = None
        check_true(await client.targets(REQUEST, given=given, deadline_s=20))
    assert lengths_asked(teacher) == [[5, 9, 30, 12], [5, 9]]


MARK = b"\xa4type\xa7targets"


@pytest.mark.parametrize(
    ("limits", "parts"),
    [
        ({"max_sequences": 3}, [[5, 9, 30], [12]]),
        ({"max_request_tokens": 40}, [[5, 9], [30], [12]]),
        # 64 bytes and four a token for each sequence, 1024 for the rest.
        ({"max_body_bytes": 1024 + 2 * 64 + 4 * 40}, [[5, 9], [30], [12]]),
        # A token costs 9 and a part an eighth of the whole.
        ({"max_cost": 8 * 9 * 44}, [[5, 9, 30], [12]]),
        ({"max_cost": 9 * 30}, [[5], [9], [30], [12]]),
    ],
)
async def test_a_request_is_sent_in_parts_that_are_admitted(limits: dict[str, int], parts: list[list[int]]) -> None:
    teacher, clock = Replica(), FakeClock()
    teacher.limits = Limits(vocab_size=VOCAB, max_sequence_length=512, **limits)
    async with client_of(teacher, clock=clock) as client:
        check_true(await client.targets(REQUEST))
    assert sorted(lengths_asked(teacher)) == sorted(parts)


async def test_parts_fit_the_smallest_of_several_replicas() -> None:
    clock, large, small = FakeClock(), Replica("t0"), Replica("t1")
    small.limits = Limits(vocab_size=VOCAB, max_sequence_length=512, max_request_tokens=40, max_cost=10**6)
    async with client_of(large, small, clock=clock) as client:
        await client.teacher()
        check_true(await client.targets(REQUEST))
    assert sorted(lengths_asked(large) + lengths_asked(small)) == [[5, 9], [12], [30]]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"max_cost": 9 * 30 - 1},
            r"sequences.2: .*costs 270 .*admits at most 269: shorten it to 29 tokens.*--capacity 270",
        ),
        (
            {"max_body_bytes": 1200},
            r"sequences.2: .*takes a body of \d+ bytes, the service accepts at most 1200: shorten it to",
        ),
        ({"max_sequence_length": 29}, r"sequences.2: 30 tokens in a sequence, expected 1 to 29"),
    ],
)
async def test_what_cannot_be_split_is_refused_before_anything_is_sent(limits: dict[str, int], message: str) -> None:
    teacher, clock = Replica(), FakeClock()
    teacher.limits = Limits(vocab_size=VOCAB, **({"max_sequence_length": 512} | limits))
    # The canary fits: its longest sequence has 32 tokens of two numbers.
    async with client_of(teacher, clock=clock) as client:
        with pytest.raises(OutOfRangeError, match=message):
            await client.targets(REQUEST)
    assert teacher.posts == []


async def test_gathered_ids_and_rows_go_with_the_parts() -> None:
    rng = np.random.default_rng(0)
    ids = tuple(rng.integers(0, VOCAB, (length - 1, 100)) for length in LENGTHS)
    request = TargetsRequest(
        sequences=REQUEST.sequences, kinds=("gather", "score"), gather_ids=ids,
        rows=tuple((1, length) for length in LENGTHS),
    )  # fmt: skip
    teacher, clock = Replica(), FakeClock()
    teacher.limits = Limits(vocab_size=VOCAB, max_sequence_length=512, max_body_bytes=14_000)
    async with client_of(teacher, clock=clock) as client:
        check_true(await client.targets(request), request)
    assert len(teacher.posts) == 3


async def test_a_body_that_a_proxy_finds_too_large_is_sent_in_smaller_parts() -> None:
    teacher, clock = Replica(), FakeClock()

    def proxy(http: httpx.Request) -> Any:
        return httpx.Response(413, html="<html>") if teacher.posts[-1].num_tokens > 30 else None

    async with client_of(teacher, clock=clock) as client:
        teacher.faults += [proxy] * 20
        check_true(await client.targets(REQUEST))
        assert lengths_asked(teacher) == [[5, 9, 30, 12], [5, 9], [30, 12], [30], [12]]
        teacher.faults.clear()
        teacher.faults += [respond(problem(413, "too_large", "for a reason"))] * 20
        with pytest.raises(TooLargeError, match="for a reason"):
            await client.targets(REQUEST)
        assert lengths_asked(teacher)[5:] == [[5, 9, 30, 12], [5, 9], [5]]


async def test_all_requests_under_way_are_counted_together_until_the_last_is_answered() -> None:
    teacher, clock = Replica(), FakeClock()
    seen: list[tuple[int, int]] = []

    async def handle(http: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.01)
        return teacher.handle(http)

    transport, policy = httpx.MockTransport(handle), RetryPolicy(max_in_flight=1)
    async with TeacherClient(teacher.url, transport=transport, timing=clock.timing(), policy=policy) as client:
        await client.teacher()
        assert client.waiting() is None

        def look(_: Any) -> None:
            waiting = client.waiting()
            assert waiting is not None
            seen.append((waiting.tokens_done, waiting.tokens))

        await asyncio.gather(*(client.targets(REQUEST, on_progress=look) for _ in range(3)))
        assert client.waiting() is None
    assert [done for done, _ in seen] == [12, 42, 51, 56, 68, 98, 107, 112, 124, 154, 163, 168]
    assert {tokens for _, tokens in seen} == {168}


class Mortal(Replica):
    """Dies of sequences that hold `poison`, and of nothing else; what it computed beside them fails with it.

    `lives` is how often it can be started again.
    """

    def __init__(self, name: str, clock: FakeClock, poison: int, *, tells: bool = True):
        super().__init__(name)
        self.clock, self.poison, self.tells = clock, poison, tells
        self.deaths, self.started_at, self.computing = 0, clock.time, 0

    async def serve(self, http: httpx.Request) -> httpx.Response:
        if http.url.path == "/v1/status":
            return httpx.Response(200, json={"uptime_s": self.clock.time - self.started_at, "requests_inside": 0})
        if http.url.path != "/v1/targets":
            return self.handle(http)
        before, posts = self.deaths, len(self.posts)
        response = self.handle(http)
        if len(self.posts) > posts and any((tokens_T == self.poison).any() for tokens_T in self.posts[-1].sequences):
            # Its neighbours are in the engine by then.
            await self.clock.sleep(0.5)
            self.deaths += 1
            self.clock.time += 5
            self.started_at = self.clock.time
        else:
            await self.clock.sleep(1.0)
        if self.deaths == before:
            return response
        if self.tells:
            return problem(503, "engine_dead", "the engine is dead", retryable=True)
        raise httpx.ReadError("reset")


@pytest.mark.parametrize("names", [("t0",), ("t0", "t1")])
@pytest.mark.parametrize("tells", [True, False])
async def test_the_sequence_that_kills_the_engine_is_named_and_its_neighbours_are_answered(
    names: tuple[str, ...], tells: bool
) -> None:
    clock = FakeClock()
    mortals = {f"{name}": Mortal(name, clock, poison=299, tells=tells) for name in names}
    healthy = [np.minimum(tokens_T, 298) for tokens_T in sequences(*range(5, 29))]
    healthy[13][3] = 299
    requests = [TargetsRequest(sequences=tuple(healthy[n : n + 3]), top_k=4) for n in range(0, 24, 3)]

    async def handle(http: httpx.Request) -> httpx.Response:
        return await mortals[http.url.host].serve(http)

    urls = [mortal.url for mortal in mortals.values()]
    async with TeacherClient(urls, transport=httpx.MockTransport(handle), timing=clock.timing()) as client:
        await client.teacher()
        given: list[dict[int, TokenTargets]] = [{} for _ in requests]
        outcomes = await asyncio.gather(
            *(client.targets(request, given=kept) for request, kept in zip(requests, given, strict=True)),
            return_exceptions=True,
        )
    failed = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
    assert failed == [4]
    error = outcomes[4]
    assert isinstance(error, DeadlyRequestError) and [len(s) for s in error.request.sequences] == [18]
    assert "one sequence of 18 tokens" in str(error)
    # Once with its neighbours, twice alone; a process that just vanishes has to do so more often.
    deaths = sum(mortal.deaths for mortal in mortals.values())
    assert deaths == 3 if tells else deaths <= 5
    for n, request in enumerate(requests):
        if n != 4:
            check_true([given[n][i] for i in range(3)], request)


async def test_what_is_known_of_a_sequence_outlives_a_call_and_the_restart_that_it_did_not_wait_for() -> None:
    teacher, clock = Replica(), FakeClock()
    teacher.limits = Limits(vocab_size=VOCAB, max_sequence_length=512)
    given: dict[int, TokenTargets] = {}

    def die(http: httpx.Request) -> Any:
        if not any(len(tokens_T) == 30 for tokens_T in teacher.posts[-1].sequences):
            return None
        teacher.down = httpx.ConnectError("gone")
        return problem(503, "engine_dead", "the engine is dead", retryable=True)

    async with client_of(teacher, clock=clock) as client:
        teacher.faults += [die] * 50
        for _ in range(2):
            with pytest.raises(TeacherUnavailableError):
                await client.targets(REQUEST, given=given, deadline_s=20)
            teacher.down = None
            clock.time += 400
        with pytest.raises(DeadlyRequestError, match="of 30 tokens"):
            await client.targets(REQUEST, given=given, deadline_s=20)
    # Those before it are asked about alone too, and kept.
    assert lengths_asked(teacher) == [[5, 9, 30, 12], [5], [9], [30], [12], [30]]


async def test_an_engine_that_dies_of_itself_accuses_nobody() -> None:
    teacher, clock = Replica(), FakeClock()
    async with client_of(teacher, clock=clock) as client:
        await client.teacher()
        for _ in range(10):
            clock.time += 60
            teacher.faults.append(respond(problem(503, "engine_dead", retryable=True)))
            check_true(await client.targets(REQUEST))
        # Nor does a network that cuts connections while the process lives.
        for _ in range(10):
            clock.time += 60
            teacher.faults += [refuse(httpx.ReadError("reset")), spoil_body(lambda body: body[:-120])]
            check_true(await client.targets(REQUEST))
