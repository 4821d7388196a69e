"""`TeacherClient` against teachers without sockets: what it asks again, what it refuses, that it mixes nothing up."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import (
    EngineError,
    OutOfRangeError,
    PoisonBatchError,
    StillhouseError,
    TeacherUnavailableError,
    TruncatedError,
    UnauthorizedError,
    WireError,
)
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets
from tests.unit.proto.fake_teacher import (
    FakeClock,
    Fault,
    Replica,
    fail_sequences,
    network,
    problem,
    refuse,
    respond,
    same_bits,
    sequences,
    spoil_body,
    spoil_record,
    truth,
)

REQUEST = TargetsRequest(sequences=tuple(sequences(5, 9, 30)), top_k=8, temperatures=(2.0,))


def client_of(*replicas: Replica, clock: FakeClock | None = None, **arguments: Any) -> TeacherClient:
    urls = [replica.url for replica in replicas]
    return TeacherClient(urls, transport=network(*replicas), timing=(clock or FakeClock()).timing(), **arguments)


def check_true(answers: list[TokenTargets], request: TargetsRequest = REQUEST) -> None:
    assert len(answers) == len(request.sequences)
    assert all(same_bits(answer, truth(request, i)) for i, answer in enumerate(answers))


def nan_in(length: int) -> Fault:
    """NaN in the record of the sequence of this length."""

    def spoil(targets: TokenTargets, i: int) -> TokenTargets:
        assert targets.lse is not None
        return replace(targets, lse=targets.lse * np.nan) if len(targets.lse) == length else targets

    return spoil_record(spoil)


def cut_after(records: int) -> Fault:
    """The body up to and with so many records; the fake sends the last sequence first."""
    return spoil_body(lambda body: body[: [m.start() for m in _records(body)][records]])


def _records(body: bytes) -> list[Any]:
    return list(re.finditer(rb"[\x80-\x8f]\xa4type(?:\xa7targets|\xa3end)", body))


async def test_targets_come_in_the_order_of_the_sequences_with_one_request() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        check_true(await client.targets(REQUEST))
        assert len(teacher.posts) == 1 and teacher.infos == 1 and teacher.canaries == 1
        assert client.stats.calls == client.stats.attempts == 1 and client.stats.bytes_received > 0


async def test_stream_hands_out_sequences_as_they_come() -> None:
    async with client_of(Replica()) as client:
        assert [index async for index, _ in client.stream(REQUEST)] == [2, 1, 0]


async def test_teacher_tells_identity_limits_and_kinds() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        assert await client.teacher() == teacher.info
        assert await client.teacher(wait_s=5) == teacher.info
        assert teacher.infos == 1


RETRIED: dict[str, Fault] = {
    "refused": refuse(httpx.ConnectError("refused")),
    "no connection in time": refuse(httpx.ConnectTimeout("slow")),
    "silence": refuse(httpx.ReadTimeout("slow")),
    "reset": refuse(httpx.ReadError("reset")),
    "broken off": refuse(httpx.RemoteProtocolError("peer closed connection")),
    "429": respond(problem(429, "quota")),
    "503": respond(problem(503, "overloaded")),
    "engine dead": respond(problem(503, "engine_dead", retryable=True)),
    "500 that is retryable": respond(problem(500, "engine_failed", retryable=True)),
    "a proxy's 502": respond(httpx.Response(502, text="<html>bad gateway</html>")),
    "a proxy's 200": respond(httpx.Response(200, html="<html>hello</html>")),
    "gzip": respond(httpx.Response(200, headers={"content-encoding": "gzip"}, content=b"\x1f\x8b")),
    "cut": spoil_body(lambda body: body[:-120]),
    "empty": spoil_body(lambda body: b""),
    "changed": spoil_body(lambda body: body.replace(truth(REQUEST, 1).lse.tobytes(), b"\0" * 36)),
    "another's answer": spoil_body(lambda body: body.replace(body[22:54], b"0" * 32)),
    "a sequence's failure": fail_sequences({1: EngineError("later", retryable=True)}),
    "nonsense once": nan_in(9),
}


@pytest.mark.parametrize("name", RETRIED)
async def test_what_may_pass_is_asked_again(name: str) -> None:
    teacher, clock = Replica(), FakeClock()
    async with client_of(teacher, clock=clock) as client:
        await client.teacher()
        teacher.faults.append(RETRIED[name])
        check_true(await client.targets(REQUEST))
        # Whoever was silent is asked for less at a time, and what an engine died of for one sequence at a time.
        assert client.stats.attempts == {"silence": 3, "engine dead": 4}.get(name, 2)
        assert sum(client.stats.errors.values()) == 1


FINAL = {
    "malformed": 400, "unauthorized": 401, "forbidden": 403, "not_found": 404,
    "unsupported_type": 415, "out_of_range": 422, "engine_failed": 500,
}  # fmt: skip


@pytest.mark.parametrize("code", FINAL)
async def test_what_will_not_pass_is_asked_once(code: str) -> None:
    teacher, other, clock = Replica("t0"), Replica("t1"), FakeClock()
    async with client_of(teacher, other, clock=clock) as client:
        await client.teacher()
        fault = respond(problem(FINAL[code], code, "for a reason", field="top_k", got=9, limit=8))
        teacher.faults.append(fault)
        other.faults.append(fault)
        with pytest.raises(StillhouseError, match="for a reason") as caught:
            await client.targets(REQUEST)
        assert (caught.value.field, caught.value.got, caught.value.limit) == ("top_k", 9, 8)
        assert len(teacher.posts) + len(other.posts) == 1 and clock.time == 1000


async def test_only_what_is_missing_is_asked_again() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        teacher.faults += [cut_after(1), cut_after(1)]
        check_true(await client.targets(REQUEST))
    asked = [[len(tokens) for tokens in post.sequences] for post in teacher.posts]
    assert asked == [[5, 9, 30], [5, 9], [5]]


async def test_rows_and_gathered_ids_follow_their_sequences() -> None:
    rng = np.random.default_rng(0)
    gather_ids = tuple(rng.integers(0, 300, (n, 2)) for n in (3, 4, 10))
    request = REQUEST.model_copy(
        update={"rows": ((1, 4), (5, 9), (20, 30)), "kinds": ("gather", "score"), "gather_ids": gather_ids}
    )
    teacher = Replica()
    async with client_of(teacher) as client:
        teacher.faults += [cut_after(1), cut_after(1)]
        check_true(await client.targets(request), request)


async def test_a_body_cut_at_any_byte_never_yields_wrong_targets() -> None:
    request = TargetsRequest(sequences=tuple(sequences(3, 2)), top_k=2)
    teacher, clock = Replica(), FakeClock()
    async with client_of(teacher, clock=clock) as client:
        await client.targets(request)
        size = client.stats.bytes_received
        for at in range(size):
            clock.time += 60
            teacher.faults.append(spoil_body(lambda body, at=at: body[:at]))
            check_true(await client.targets(request), request)
        assert client.stats.errors["truncated"] == size


@pytest.mark.parametrize("kinds", [("score",), ("sampled",)], ids=str)
async def test_a_bit_that_flips_never_gives_a_sequence_anothers_targets(kinds: tuple[Any, ...]) -> None:
    """The two sequences are equally long, so that nothing but the record says whose it is."""
    request = TargetsRequest(sequences=tuple(sequences(4, 4)), kinds=kinds, top_k=2, num_samples=2)
    teacher, policy = Replica(), RetryPolicy(budget_floor=10**6, open_after=10**6)
    async with client_of(teacher, policy=policy) as client:
        bodies: list[bytes] = []
        teacher.faults.append(spoil_body(lambda body: (bodies.append(body), body)[1]))
        check_true(await client.targets(request), request)
        places = [found.start() + at for found in re.finditer(b"\xa5index", bodies[0]) for at in range(-8, 40)]
        asked_again = 0
        for at in places:
            for bit in range(8):
                attempts = client.stats.attempts
                teacher.faults.append(
                    spoil_body(lambda body, at=at, bit=bit: body[:at] + bytes([body[at] ^ 1 << bit]) + body[at + 1 :])
                )
                with suppress(StillhouseError):
                    check_true(await client.targets(request), request)
                teacher.faults.clear()
                asked_again += client.stats.attempts > attempts + 1
        assert len(places) == 96 and asked_again > 0.9 * 8 * len(places)


@pytest.mark.parametrize("asked_before", ["the same", "more"])
async def test_the_answer_to_an_earlier_request_is_not_taken_for_this_one(asked_before: str) -> None:
    teacher, kept = Replica(), []
    earlier = TargetsRequest(sequences=(*REQUEST.sequences, *sequences(7)), top_k=8, temperatures=(2.0,))

    def keep(body: bytes) -> bytes:
        kept.append(body)
        return body

    def replay(http: httpx.Request) -> httpx.Response:
        mine = http.headers["x-request-id"].encode()
        body = kept[0] if asked_before == "the same" else kept[0].replace(ids[0], mine)
        return httpx.Response(200, headers={"content-type": "application/msgpack"}, content=body)

    ids: list[bytes] = []
    async with client_of(teacher) as client:
        teacher.faults.append(lambda http: ids.append(http.headers["x-request-id"].encode()) or spoil_body(keep)(http))
        await client.targets(REQUEST if asked_before == "the same" else earlier)
        teacher.faults.append(replay)
        check_true(await client.targets(REQUEST))
        assert client.stats.errors["wire"] == 1


async def test_a_service_that_does_not_say_whose_a_record_is_is_understood() -> None:
    teacher = Replica()
    teacher.crcs = False
    async with client_of(teacher) as client:
        check_true(await client.targets(REQUEST))


async def test_retry_after_is_waited_for() -> None:
    teacher, clock = Replica(), FakeClock()
    async with client_of(teacher, clock=clock) as client:
        await client.teacher()
        before = clock.time
        teacher.faults.append(respond(problem(503, "overloaded", retry_after=7)))
        check_true(await client.targets(REQUEST))
        assert 7 <= clock.time - before <= 7 + 0.5 + 0.25


@pytest.mark.parametrize("header", ["soon", "-5", "nan", "inf", "Wed, 21 Oct 2015 07:28:00 GMT", "1e9"])
async def test_a_strange_retry_after_is_not_waited_for_long(header: str) -> None:
    teacher, clock = Replica(), FakeClock()
    async with client_of(teacher, clock=clock) as client:
        await client.teacher()
        before = clock.time
        teacher.faults.append(respond(problem(429, "quota", retry_after=header)))
        check_true(await client.targets(REQUEST))
        assert clock.time - before <= 61


async def test_the_next_replica_is_asked_at_once() -> None:
    one, two, clock = Replica("t0"), Replica("t1"), FakeClock()
    async with client_of(one, two, clock=clock) as client:
        await client.targets(REQUEST)
        first, second = (one, two) if one.posts else (two, one)
        first.faults.append(refuse(httpx.ReadTimeout("hangs")))
        check_true(await client.targets(REQUEST))
        assert len(second.posts) == 1 and clock.time == 1000


async def test_one_dead_replica_of_two_costs_nothing_but_its_probes() -> None:
    one, two, clock = Replica("t0"), Replica("t1"), FakeClock()
    async with client_of(one, two, clock=clock) as client:
        await client.targets(REQUEST)
        first, second = (one, two) if one.posts else (two, one)
        first.down = httpx.ConnectError("gone")
        for _ in range(50):
            check_true(await client.targets(REQUEST))
        assert len(second.posts) == 50 and client.stats.attempts == 1 + 3 + 50
        first.down = None
        clock.time += 2
        check_true(await client.targets(REQUEST))
        await asyncio.sleep(0.01)
        check_true(await client.targets(REQUEST))
        assert len(first.posts) == 2 and first.canaries == 2


async def test_the_only_teacher_dead_for_30_s_is_waited_for() -> None:
    teacher, clock = Replica(), FakeClock()
    async with client_of(teacher, clock=clock) as client:
        await client.targets(REQUEST)
        teacher.down = httpx.ConnectError("gone")
        back_at = clock.time + 30
        sleep = clock.sleep

        async def sleep_and_heal(seconds: float) -> None:
            await sleep(seconds)
            if clock.time >= back_at:
                teacher.down = None

        client._timing.sleep = sleep_and_heal
        calls = await asyncio.gather(*(client.targets(REQUEST) for _ in range(4)))
        for answers in calls:
            check_true(answers)
        assert clock.time - back_at <= 3
        assert client.stats.attempts - client.stats.calls <= 8, "an outage is waited out with probes, not with requests"
        assert client.outage_s == 0


async def test_outage_is_measured_while_it_lasts() -> None:
    teacher, clock = Replica(), FakeClock()
    async with client_of(teacher, clock=clock) as client:
        teacher.down = httpx.ConnectError("gone")
        with pytest.raises(TeacherUnavailableError):
            await client.targets(REQUEST, deadline_s=20)
        assert 19 <= client.outage_s <= 25


async def test_the_deadline_ends_a_call_with_what_was_tried() -> None:
    teacher, clock = Replica(), FakeClock()
    policy = RetryPolicy(deadline_s=40)
    async with client_of(teacher, clock=clock, policy=policy) as client:
        await client.teacher()
        before = clock.time
        teacher.faults += [respond(problem(503, "overloaded", "full up", retry_after=5))] * 100
        with pytest.raises(TeacherUnavailableError, match=r"40.0 s|full up"):
            await client.targets(REQUEST)
        assert clock.time - before <= 41


async def test_an_answer_that_trickles_ends_at_the_deadline() -> None:
    teacher, clock = Replica(), FakeClock()
    request_of: list[httpx.Request] = []

    class Trickle(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            body = teacher.answer(request_of[0], teacher.posts[0]).content
            for byte in body:
                clock.time += 1
                yield bytes([byte])

    def trickle(http: httpx.Request) -> httpx.Response:
        request_of.append(http)
        return httpx.Response(200, headers={"content-type": "application/msgpack"}, stream=Trickle())

    async with client_of(teacher, clock=clock) as client:
        await client.teacher()
        teacher.faults.append(trickle)
        with pytest.raises(TeacherUnavailableError, match="still arriving after 10 s without progress"):
            await client.targets(REQUEST, deadline_s=10)


async def test_nonsense_twice_is_a_poison_batch_with_the_sequences_to_dump() -> None:
    one, two = Replica("t0"), Replica("t1")
    async with client_of(one, two) as client:
        await client.teacher()
        for replica in (one, two):
            replica.faults += [nan_in(9), nan_in(9)]
        with pytest.raises(PoisonBatchError, match="lse: NaN or infinite") as caught:
            await client.targets(REQUEST)
        assert len(one.posts) == len(two.posts) == 1, "the second opinion is another replica's"
        assert isinstance(caught.value.request, TargetsRequest)
        assert [len(tokens) for tokens in caught.value.request.sequences] == [9]
        assert len(caught.value.reasons) == 2 and one.url in str(caught.value) and two.url in str(caught.value)


async def test_neighbours_of_a_poison_sequence_are_handed_out() -> None:
    teacher, got = Replica(), []
    teacher.faults.append(fail_sequences({1: EngineError("fails on token 7")}))
    async with client_of(teacher) as client:
        with pytest.raises(EngineError, match="fails on token 7"):
            async for index, _ in client.stream(REQUEST):
                got.append(index)
    assert sorted(got) == [0, 2] and len(teacher.posts) == 1


async def test_bytes_that_something_rewrites_every_time_end_the_call() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        await client.teacher()
        teacher.faults += [spoil_body(lambda body: body.replace(b"targets", b"tarGets"))] * 100
        with pytest.raises(WireError, match="unknown message type tarGets"):
            await client.targets(REQUEST)
        assert len(teacher.posts) == 4


async def test_what_the_teacher_would_refuse_is_not_sent() -> None:
    teacher = Replica()
    async with client_of(teacher) as client:
        for changes in ({"top_k": 0}, {"top_k": 1000}, {"temperatures": (0.0,)}, {"rows": ((0, 9),)}):
            with pytest.raises(OutOfRangeError):
                await client.targets(REQUEST.model_copy(update=changes))
        with pytest.raises(OutOfRangeError, match="token ids from 0 to 299"):
            await client.targets(TargetsRequest(sequences=([300],)))
    assert teacher.posts == []


async def test_leaving_a_stream_closes_the_connection() -> None:
    closed = asyncio.Event()
    teacher = Replica()

    class Stream(httpx.AsyncByteStream):
        def __init__(self, body: bytes):
            self.body = body

        async def __aiter__(self) -> Any:
            for at in range(0, len(self.body), 50):
                yield self.body[at : at + 50]

        async def aclose(self) -> None:
            closed.set()

    def slowly(http: httpx.Request) -> httpx.Response:
        body = teacher.answer(http, teacher.posts[0]).content
        return httpx.Response(200, headers={"content-type": "application/msgpack"}, stream=Stream(body))

    async with client_of(teacher) as client:
        teacher.faults.append(slowly)
        stream = client.stream(REQUEST)
        assert (await anext(stream))[0] == 2
        assert not closed.is_set()
        await stream.aclose()
        assert closed.is_set()


async def test_the_key_goes_out_and_is_not_shown() -> None:
    seen: list[str | None] = []
    teacher = Replica()

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return teacher.handle(request)

    transport = httpx.MockTransport(handle)
    async with TeacherClient(teacher.url, key="sesame", transport=transport, timing=FakeClock().timing()) as client:
        await client.targets(REQUEST)
        assert "sesame" not in repr(client)
    assert set(seen) == {"Bearer sesame"}


@pytest.mark.parametrize(("key", "sent"), [("sesame\n", "Bearer sesame"), (" sesame\r\n", "Bearer sesame"), ("", None)])
async def test_a_key_from_a_file_or_an_empty_variable_is_sent_as_a_header_can_be(key: str, sent: str | None) -> None:
    async with TeacherClient("http://t0:8000", key=key) as client:
        assert client._http.headers.get("authorization") == sent


@pytest.mark.parametrize("key", ["sesame\nsesame", "sésame", "sesame\0"])
def test_a_key_that_no_header_holds_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="the API key holds a character") as refused:
        TeacherClient("http://t0:8000", key=key)
    assert "same" not in str(refused.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: httpx.Response(404, json={"detail": "Not Found"}), "is not a Stillhouse teacher"),
        (lambda _: httpx.Response(200, html="<html>"), "is not a Stillhouse teacher"),
        (lambda _: httpx.Response(200, json={"object": "list"}), "is not a Stillhouse teacher"),
        (lambda _: httpx.Response(200, json=[1]), "is not a Stillhouse teacher"),
        (lambda _: httpx.Response(200, content=b"[" * 100_000), "is not a Stillhouse teacher"),
        (lambda _: httpx.Response(302, headers={"location": "http://elsewhere"}), "302 Found, which is not .*teacher"),
        (lambda _: httpx.Response(502, text="bad gateway"), "502 Bad Gateway, which is not .*teacher"),
        (lambda _: httpx.Response(200, json={"identity": {}, "version": 7}), "uses version 7 of the wire format, this"),
        (lambda _: httpx.Response(200, json={"identity": {}, "version": 1}), "identity.semantic: Field required"),
        (lambda _: problem(401, "unauthorized", "which key?"), "which key"),
        (lambda _: problem(503, "overloaded", "still loading", retry_after=2), "still loading"),
    ],
)  # fmt: skip
async def test_what_is_no_teacher_is_told_clearly_and_at_once(answer: Callable[..., Any], message: str) -> None:
    clock = FakeClock()
    transport = httpx.MockTransport(answer)
    async with TeacherClient("http://somewhere:80", transport=transport, timing=clock.timing()) as client:
        with pytest.raises(StillhouseError, match=message):
            await client.teacher()
    assert clock.time == 1000


async def test_nobody_at_the_url_is_told_clearly_and_at_once() -> None:
    clock = FakeClock()
    async with TeacherClient("http://nobody:80", transport=network(), timing=clock.timing()) as client:
        with pytest.raises(
            TeacherUnavailableError, match=r"nothing is listening at http://nobody:80 .*stillhouse-teacher MODEL"
        ):
            await client.teacher()
    assert clock.time == 1000


async def test_a_key_that_is_not_known_ends_a_waiting_call_too() -> None:
    transport = httpx.MockTransport(lambda _: problem(401, "unauthorized", "which key?"))
    async with TeacherClient("http://t0:80", transport=transport, timing=FakeClock().timing()) as client:
        with pytest.raises(UnauthorizedError):
            await client.targets(REQUEST)


async def test_a_teacher_that_loads_is_waited_for() -> None:
    teacher, clock = Replica(), FakeClock()
    answers = [problem(503, "overloaded", "still loading", retry_after=1)] * 5

    def handle(request: httpx.Request) -> httpx.Response:
        return answers.pop() if answers else teacher.handle(request)

    transport = httpx.MockTransport(handle)
    async with TeacherClient(teacher.url, transport=transport, timing=clock.timing()) as client:
        assert await client.teacher(wait_s=60) == teacher.info
    assert 5 <= clock.time - 1000 <= 20


@pytest.mark.parametrize(
    "urls", [[], "", "teacher:8000", "ftp://teacher", "http://", "http://t/?x=1", ["http://t", "http://t/"], "http://[::1"]
)  # fmt: skip
def test_urls_that_are_none_are_refused(urls: Any) -> None:
    with pytest.raises(ValueError, match="URL"):
        TeacherClient(urls)


async def test_a_bug_in_a_probe_is_not_swallowed() -> None:
    async with client_of(Replica()) as client:

        async def broken(_: Any) -> None:
            raise ZeroDivisionError

        client._pool._probe = broken
        with pytest.raises(ZeroDivisionError):
            await client.targets(REQUEST)


async def test_truncation_says_what_came_and_what_was_expected() -> None:
    teacher = Replica()
    async with client_of(teacher, policy=RetryPolicy(max_wire_errors=1)) as client:
        teacher.faults.append(cut_after(2))
        with pytest.raises(TruncatedError, match=r"stopped after \d+ bytes with 2 of 3 sequences"):
            await client.targets(REQUEST)
