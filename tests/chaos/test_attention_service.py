"""The attention service when things fail: out of memory, hung, killed, left by its client, told to stop. All real."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from teacher_proto.attention import AttentionRequest
from teacher_proto.client.attention_client import AttentionClient
from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.errors import TeacherUnavailableError, WrongTeacherError
from teacher_proto.wire.attention import ATTENTION_FORMAT
from teacher_proto.wire.records import MSGPACK, encode_request
from teacher_proto.wire.responses import Progress, ResponseDecoder
from tests.chaos.crowd import until_admitted, until_gauge
from tests.teacher_process import AttentionProcess
from tests.unit.attention_service.models import save_tiny

LENGTH = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny(folder, "llama", max_position_embeddings=LENGTH)


@pytest.fixture
def service(folder: Path) -> Iterator[AttentionProcess]:
    with AttentionProcess(folder, "--max-entries", str(2**28)) as process:
        yield process


@pytest.fixture
async def http(service: AttentionProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
        yield client


def request(length: int = 50, *, seed: int = 0, **fields: object) -> AttentionRequest:
    tokens_T = np.random.default_rng(seed).integers(0, 512, length)
    return AttentionRequest.model_validate({"sequences": (tokens_T,)} | fields)


def slow(seed: int = 0) -> AttentionRequest:
    """Three tables of 4 x 2000 x 2000: a second or so, and five fit into the capacity at once."""
    return request(2000, seed=seed, kind="relations", relation_heads=4)


async def post(http: httpx.AsyncClient, asked: AttentionRequest) -> httpx.Response:
    return await http.post("/v1/attention", content=encode_request(asked), headers={"Content-Type": MSGPACK})


def is_whole(response: httpx.Response) -> bool:
    decoder = ResponseDecoder(ATTENTION_FORMAT)
    messages = list(decoder.feed(response.content))
    decoder.close()
    return len(messages) == 3


async def test_running_out_of_memory_fails_that_request_alone_and_the_service_lives(
    service: AttentionProcess, http: httpx.AsyncClient
) -> None:
    process = psutil.Process(service.pid)
    process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms + 100 * 2**20, resource.RLIM_INFINITY))
    large = request(LENGTH, kind="relations", relation_heads=4)
    failed = await post(http, large)
    assert failed.status_code == 503 and failed.json()["code"] == "engine_out_of_memory" and failed.json()["retryable"]
    assert "retry-after" in failed.headers
    assert is_whole(await post(http, request()))
    assert (await http.get("/health/ready")).status_code == 200
    assert "stillhouse_engine_out_of_memory_total 1.0" in (await http.get("/metrics")).text
    process.rlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert is_whole(await post(http, large))


async def test_states_beyond_float16_fail_alone_and_the_engine_lives(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "large", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with AttentionProcess(folder, "--layer", "2") as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=120) as http:
            asked = [
                request(seed=n, layer=2, dtype="float16" if n % 3 == 0 else "int8") for n in range(9)
            ]  # one length: they go in one batch
            answers = await asyncio.gather(*(post(http, one) for one in asked))
            for n, answer in enumerate(answers):
                if n % 3:
                    assert is_whole(answer)
                else:
                    assert answer.status_code == 500 and "does not fit float16" in answer.json()["message"]
                    assert not answer.json()["retryable"]
            assert is_whole(await post(http, request(seed=99, layer=0)))
            assert (await http.get("/health/ready")).status_code == 200


async def test_a_client_that_asks_for_it_hears_of_its_progress(http: httpx.AsyncClient) -> None:
    async def progress(seed: int) -> list[Progress]:
        headers = {"Content-Type": MSGPACK, "X-Progress": "1"}
        response = await http.post("/v1/attention", content=encode_request(slow(seed)), headers=headers)
        decoder = ResponseDecoder(ATTENTION_FORMAT)
        messages = list(decoder.feed(response.content))
        decoder.close()
        return [message for message in messages if isinstance(message, Progress)]

    rounds = 0
    while not any(told := await asyncio.gather(*(progress(10 * rounds + n) for n in range(8)))):
        rounds += 1
        assert rounds < 10  # a machine that does each eight in a second
    last = max((message for one in told for message in one), key=lambda message: message.tokens_ahead)
    assert last.tokens == 2000 and last.tokens_done == 0 and last.tokens_ahead % 2000 == 0


async def test_a_client_that_leaves_gives_its_permit_back(service: AttentionProcess, http: httpx.AsyncClient) -> None:
    asked = [asyncio.create_task(post(http, slow(seed))) for seed in range(3)]
    await until_admitted(http, 3)
    for task in asked:
        task.cancel()
    await until_gauge(http, "admitted_requests", lambda value: value == 0)
    await until_gauge(http, "queue_tokens", lambda value: value == 0)
    assert is_whole(await post(http, request()))


async def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(
    service: AttentionProcess, http: httpx.AsyncClient
) -> None:
    accepted = [asyncio.create_task(post(http, slow(seed))) for seed in range(3)]
    await until_admitted(http, 3)
    service.signal()
    refused = await post(http, request(seed=9))
    ready = await http.get("/health/ready")
    assert {refused.status_code, ready.status_code} == {503} and int(refused.headers["retry-after"]) >= 1
    assert all([is_whole(await task) for task in accepted])
    assert await asyncio.to_thread(service.wait) == 0


async def test_a_hung_replica_is_left_for_one_that_answers(folder: Path, service: AttentionProcess) -> None:
    policy = RetryPolicy(read_timeout_s=2.0, probe_timeout_s=2.0)
    with AttentionProcess(folder) as other:
        async with AttentionClient([service.url, other.url], policy=policy) as client:
            await client.attention(request())
            service.signal(signal.SIGSTOP)
            answers = [await client.attention(request(seed=seed), deadline_s=60) for seed in range(8)]
            service.signal(signal.SIGCONT)
    assert len(answers) == 8


async def test_a_killed_service_is_waited_for_and_the_call_goes_on_when_it_is_back(folder: Path) -> None:
    with AttentionProcess(folder) as first:
        async with AttentionClient(first.url) as client:
            (before,) = await client.attention(request())
            first.signal(signal.SIGKILL)
            first.wait()
            with pytest.raises(TeacherUnavailableError, match="no attention service was available"):
                await client.attention(request(seed=1), deadline_s=1.0)
            waiting = asyncio.create_task(client.attention(request(), deadline_s=120))
            with AttentionProcess(folder, port=first.port):
                (after,) = await waiting
    assert before.query is not None and np.array_equal(before.query, after.query)


async def test_another_model_behind_the_same_url_stops_the_call(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "tiny", "llama", seed=1, max_position_embeddings=LENGTH)
    with AttentionProcess(folder) as first:
        async with AttentionClient(first.url) as client:
            await client.attention(request())
            first.stop()
            with AttentionProcess(other, port=first.port), pytest.raises(WrongTeacherError, match=r"semantic\.weights"):
                await client.attention(request(seed=1), deadline_s=120)
