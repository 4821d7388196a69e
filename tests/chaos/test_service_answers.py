"""Answers of the real service on their way to the real client: cut, changed, swapped, or wrong from the start.

Whatever happens, the client returns what the teacher said or an error, and never anything else.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import numpy as np
import psutil
import pytest

from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import StillhouseError, TruncatedError, WireError
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.records import MSGPACK, TARGETS_FORMAT, encode_request
from teacher_proto.wire.responses import ResponseDecoder
from tests.chaos.crowd import crowd, request_body
from tests.teacher_process import TeacherProcess

QUICK = RetryPolicy(deadline_s=20, backoff_base_s=0.001, backoff_cap_s=0.002, budget_ratio=1.0, budget_floor=10**6,
                    open_after=10**6, read_timeout_s=3)  # fmt: skip
REQUEST = TargetsRequest.model_validate({"sequences": [[5, 7, 300, 7], [1, 2, 3]], "top_k": 4, "temperatures": [2.0]})
Change = Callable[[bytes, int], bytes]


class Proxy:
    """A TCP proxy that changes what the teacher answers: `change(chunk, offset)` of the bytes since it was armed."""

    def __init__(self, teacher: TeacherProcess):
        self._teacher = teacher
        self.change: Change | None = None
        self._offset = 0
        self.url = ""

    def arm(self, change: Change | None) -> None:
        self.change, self._offset = change, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(self._teacher.host, self._teacher.port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
            try:
                while chunk := await source.read(65_536):
                    if answers and self.change is not None:
                        chunk, offset = self.change(chunk, self._offset), self._offset
                        self._offset = offset + max(1, len(chunk))
                    sink.write(chunk)
                    await sink.drain()
            except (ConnectionError, asyncio.CancelledError):
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, ours, False), pump(theirs, writer, True))


@asynccontextmanager
async def proxied(teacher: TeacherProcess) -> AsyncIterator[Proxy]:
    proxy = Proxy(teacher)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess("--log-level", "error") as process:
        yield process


def same(ours: list[TokenTargets], theirs: list[TokenTargets]) -> bool:
    return all(
        a.start == b.start and a.tensors().keys() == b.tensors().keys()
        and all(np.array_equal(x, b.tensors()[name], equal_nan=x.dtype.kind == "f") for name, x in a.tensors().items())
        for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip


async def test_a_bit_that_flips_on_the_way_never_reaches_the_caller(teacher: TeacherProcess) -> None:
    generator = random.Random(0)
    async with proxied(teacher) as proxy, TeacherClient(proxy.url, policy=QUICK) as client:
        truth = await client.targets(REQUEST)
        seen: list[int] = []
        proxy.arm(lambda chunk, offset: (seen.append(len(chunk)), chunk)[1])
        await client.targets(REQUEST)
        length = sum(seen)
        detected = unharmed = failed = 0
        for place in range(0, length, 3):
            bit = 1 << generator.randrange(8)
            flipped: list[bool] = []

            def change(
                chunk: bytes, offset: int, place: int = place, bit: int = bit, done: list[bool] = flipped
            ) -> bytes:
                if done or not offset <= place < offset + len(chunk):
                    return chunk
                done.append(True)
                at = place - offset
                return chunk[:at] + bytes([chunk[at] ^ bit]) + chunk[at + 1 :]

            errors = sum(client.stats.errors.values())
            proxy.arm(change)
            try:
                assert same(await client.targets(REQUEST, deadline_s=10), truth), (
                    f"a wrong answer: byte {place}, bit {bit}"
                )
                noticed = sum(client.stats.errors.values()) > errors
                detected, unharmed = detected + noticed, unharmed + (not noticed)
            except StillhouseError:
                failed += 1
            proxy.arm(None)
    print(f"{length} bytes of answer: of {detected + unharmed + failed} flips {detected} were asked again, {failed} "
          f"ended the call, {unharmed} changed nothing that is read (HTTP headers); 0 wrong answers")  # fmt: skip
    assert detected + failed > unharmed


async def test_an_answer_cut_at_any_byte_is_never_taken_for_whole(teacher: TeacherProcess) -> None:
    async with httpx.AsyncClient(base_url=teacher.url) as client:
        response = await client.post("/v1/targets", content=encode_request(REQUEST), headers={"Content-Type": MSGPACK})
    body = response.content
    for length in range(len(body)):
        decoder = ResponseDecoder(TARGETS_FORMAT)
        with pytest.raises((TruncatedError, WireError)):
            list(decoder.feed(body[:length]))
            decoder.close()
    decoder = ResponseDecoder(TARGETS_FORMAT)
    list(decoder.feed(body))
    decoder.close()
    print(f"{len(body)} cuts, all noticed")


async def test_the_answer_to_another_request_is_refused(teacher: TeacherProcess) -> None:
    async with httpx.AsyncClient(base_url=teacher.url) as http:
        other = encode_request(TargetsRequest.model_validate({"sequences": [[9, 9, 9, 9], [8, 8, 8]], "top_k": 4,
                                                              "temperatures": [2.0]}))  # fmt: skip
        foreign = (await http.post("/v1/targets", content=other, headers={"Content-Type": MSGPACK})).content

    async def swap(request: httpx.Request) -> httpx.Response:
        async with httpx.AsyncClient() as http:
            if request.url.path != "/v1/targets" or b"\x05\x00\x00\x00\x07" not in request.content:
                response = await http.request(
                    request.method, request.url, content=request.content, headers=request.headers
                )
                return httpx.Response(response.status_code, content=response.content, headers={
                    "content-type": response.headers["content-type"]})  # fmt: skip
        return httpx.Response(200, content=foreign, headers={"content-type": MSGPACK})

    async with TeacherClient(teacher.url, policy=QUICK, transport=httpx.MockTransport(swap)) as client:
        with pytest.raises(StillhouseError):
            await client.targets(REQUEST, deadline_s=3)
        assert client.stats.errors["wire"] >= 1


@pytest.mark.parametrize(
    "corrupt", ["nan", "infinite", "positive", "unsorted", "duplicate_id", "id_out_of_range", "wrong_k", "missing_row",
                "mass"],
)  # fmt: skip
async def test_nonsense_from_the_engine_is_refused_by_service_or_client(corrupt: str) -> None:
    with TeacherProcess("--log-level", "error", script={"corrupt": corrupt}) as teacher:
        async with TeacherClient(teacher.url, policy=QUICK) as client:
            with pytest.raises(StillhouseError):
                await client.targets(REQUEST, deadline_s=3)


async def test_valid_answers_are_never_refused(teacher: TeacherProcess) -> None:
    generator = np.random.default_rng(0)
    rows = 0
    async with TeacherClient(teacher.url) as client:
        for top_k in (1, 2, 7, 64, 256):
            request = TargetsRequest.model_validate({
                "sequences": [generator.integers(0, 512, int(n)) for n in generator.integers(1, 400, 40)],
                "top_k": top_k, "temperatures": [0.5, 5.0], "kinds": ["top_k", "score", "sampled", "hidden"],
            })  # fmt: skip
            rows += sum(targets.num_rows for targets in await client.targets(request))
        assert not client.stats.errors
    print(f"{rows} valid rows, none refused")


async def test_a_full_teacher_is_not_stormed_by_those_it_refused() -> None:
    with TeacherProcess("--capacity", "500", "--log-level", "error", script={"delay_s": 0.3}) as small:
        asked: list[float] = []

        async def one(number: int) -> None:
            async def note(request: httpx.Request) -> None:
                if request.url.path == "/v1/targets":
                    asked.append(asyncio.get_running_loop().time())

            async with TeacherClient(small.url, policy=RetryPolicy(deadline_s=30, open_after=10**6)) as client:
                client._http.event_hooks["request"].append(note)
                body = {"sequences": [[number + 1] * 40], "top_k": 8}
                await client.targets(TargetsRequest.model_validate(body))

        await asyncio.gather(*(one(n) for n in range(8)))
        retries = len(asked) - 8 - 8  # eight canaries
        print(f"8 clients of a teacher for one: {len(asked)} requests, {max(0, retries)} of them repeats")
        assert len(asked) < 8 * 10


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_ten_minutes_of_everything_leak_nothing() -> None:
    with TeacherProcess("--log-level", "error", "--window", "2000",
                        script={"delay_s": 0.005, "poison_token": 0}) as teacher:  # fmt: skip
        process = psutil.Process(teacher.pid)
        end = time.monotonic() + 600
        readings: list[tuple[float, int, int, int]] = []

        async def read() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(10)
                readings.append((time.monotonic(), process.memory_info().rss, process.num_fds(), process.num_threads()))

        async def leave() -> None:
            while time.monotonic() < end:
                reader, writer = await asyncio.open_connection(teacher.host, teacher.port)
                body = request_body(100, seed=random.randrange(10**9))
                writer.write(b"POST /v1/targets HTTP/1.1\r\nHost: x\r\nContent-Type: application/msgpack\r\n"
                             + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
                await asyncio.sleep(random.uniform(0, 0.02))
                writer.transport.abort()
                assert reader is not None

        def body(n: int) -> bytes:
            return request_body(20 + n % 200, seed=n, sequences=1 + n % 4, first=n % 50)

        load = crowd(teacher.url, 8, body, lambda: time.monotonic() > end)
        outcomes, _, _ = await asyncio.gather(load, read(), leave())
        settled = readings[len(readings) // 4 :]
        minutes = [(at - settled[0][0]) / 60 for at, *_ in settled]
        slope = float(np.polyfit(minutes, [rss / 2**20 for _, rss, _, _ in settled], 1)[0])
        print(f"{len(outcomes)} requests in 10 minutes: memory {slope:+.3f} MiB a minute, descriptors "
              f"{settled[0][2]} to {settled[-1][2]}, threads {settled[0][3]} to {settled[-1][3]}")  # fmt: skip
        assert slope < 1.0 and abs(settled[-1][2] - settled[0][2]) < 10
        assert {outcome.status for outcome in outcomes} <= {200, 500}
