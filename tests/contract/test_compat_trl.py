"""TRL's own client, as its distillation trainers use it, against our `/v1/completions`."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.contract.faces import VOCAB, truth_of
from tests.teacher_process import TeacherProcess

# TRL's client imports vLLM's.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore:TRL currently supports")]
KEY = "0123456789abcdef"
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, VOCAB, length).tolist() for length in (12, 5, 30)]
PROMPT_LENGTHS = [4, 2, 29]


@pytest.fixture(scope="module")
def client_class() -> Any:
    from trl.generation.vllm_client import VLLMClient

    return VLLMClient


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess() as process:
        yield process


@pytest.mark.parametrize("chunk_size", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("top_k", [8, 64])
def test_sequence_logprobs_are_the_teachers_at_the_temperature_asked_for(
    client_class: Any, teacher: TeacherProcess, top_k: int, temperature: float, chunk_size: int
) -> None:
    client = client_class(base_url=teacher.url)
    assert client.model == "scripted"
    answer = client.get_sequence_logprobs(
        SEQUENCES, PROMPT_LENGTHS, top_logprobs=top_k, temperature=temperature, chunk_size=chunk_size
    )
    for n, (tokens, start) in enumerate(zip(SEQUENCES, PROMPT_LENGTHS, strict=True)):
        truth_RV = truth_of(tokens, temperature)[start - 1 : -1]
        best_RK = np.argsort(-truth_RV, axis=1, kind="stable")[:, :top_k]
        logprobs_RK, ids_RK = np.array(answer["logprobs"][n]), np.array(answer["logprob_token_ids"][n])
        assert logprobs_RK.shape == (len(tokens) - start, top_k)
        np.testing.assert_array_equal(ids_RK, best_RK)
        np.testing.assert_allclose(logprobs_RK, np.take_along_axis(truth_RV, best_RK, 1), rtol=4e-3, atol=4e-3)
        assert [token for (token,) in answer["actual_token_ids"][n]] == tokens[start:]
        actual_R = truth_RV[np.arange(len(truth_RV)), tokens[start:]]
        np.testing.assert_allclose(np.array(answer["actual_logprobs"][n])[:, 0], actual_R, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
async def test_async_distillations_scorer_reads_every_candidate_and_the_token_that_came(
    teacher: TeacherProcess, temperature: float
) -> None:
    """The worker's own method, without the process and the dataset around it."""
    import aiohttp
    from trl.experimental.async_distillation.async_rollout_worker import _AsyncRolloutLoop

    loop = object.__new__(_AsyncRolloutLoop)
    loop.teacher_temperature, loop.teacher_top_k, loop.request_timeout = temperature, 8, 30.0
    loop._counters = collections.Counter()
    tokens, start = SEQUENCES[2], 10
    async with aiohttp.ClientSession() as loop.session:
        ids, logprobs = await loop._score_with_teacher(tokens[:start], tokens[start:], teacher.url, teacher.model)
    truth_RV = truth_of(tokens, temperature)[start - 1 : -1]
    assert len(ids) == len(logprobs) == len(tokens) - start
    for row_V, came, ids_K, logprobs_K in zip(truth_RV, tokens[start:], ids, logprobs, strict=True):
        best = np.argsort(-row_V, kind="stable")[:8].tolist()
        assert ids_K == (best if came in best else [*best, came]), "by rank, the token that came at the end"
        np.testing.assert_allclose(logprobs_K, row_V[ids_K], rtol=4e-3, atol=4e-3)


def test_a_client_beyond_its_share_asks_again_and_is_answered(client_class: Any) -> None:
    """TRL's client asks again after 503 alone. It has no option for a key, but its URL may carry one."""
    long = np.arange(200).tolist()
    with TeacherProcess("--capacity", "10000", script={"delay_s": 4.0}, keys=f"alice {KEY}") as teacher:
        root = teacher.url.replace("//", f"//alice:{KEY}@")
        # A share of a client alone is half of the capacity: what is in flight already takes most of that.
        body = {"prompt": long, "max_tokens": 0, "prompt_logprobs": 2}
        first = threading.Thread(
            target=httpx.post, args=(f"{root}/v1/completions",), kwargs={"json": body, "timeout": 60}
        )
        first.start()
        status = lambda: httpx.get(f"{root}/v1/status").json()  # noqa: E731
        until(lambda: status()["requests_inside"] == 1)
        small = {"prompt": long[:20], "max_tokens": 0, "prompt_logprobs": 2}
        refused = httpx.post(f"{root}/v1/completions", json=small)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert "share" in refused.json()["message"]
        ours = httpx.post(f"{root}/v1/targets", json={"sequences": [long[:20]], "top_k": 8})
        assert (ours.status_code, ours.json()["code"]) == (429, "quota")
        answer = client_class(base_url=root).get_sequence_logprobs([long[:20]], [10], top_logprobs=2)
        assert len(answer["logprobs"][0]) == 10
        rejected = status()["rejected"]
        assert rejected["quota"] == 1 and rejected["overloaded"] >= 2, "it was refused before it was answered"
        first.join()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
