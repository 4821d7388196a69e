"""What other people's trainers send to vLLM's `/v1/completions` and read of it: requests as their sources make them,
and their readers, written down here. Sources are named at each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.contract.faces import VOCAB, truth_of
from tests.teacher_process import TeacherProcess

TOP_K = 8
RNG = np.random.default_rng(1)
SEQUENCES = [RNG.integers(0, VOCAB, length).tolist() for length in (12, 2, 30)]


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess() as process:
        yield process


def post(teacher: TeacherProcess, payload: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{teacher.url}/v1/completions", json=payload, timeout=60)
    response.raise_for_status()
    return response.json()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_axolotls_online_distillation(teacher: TeacherProcess, temperature: float) -> None:
    """axolotl 0.19.0, integrations/kd/collator_online_teacher.py, `fetch_online_logprobs_vllm`: no model and no
    `max_tokens`; a position's dictionary is taken in its order, and cut to K."""
    payload = {
        "prompt": SEQUENCES, "echo": True, "logprobs": True, "prompt_logprobs": TOP_K, "top_logprobs": TOP_K,
        "max_new_tokens": 0, "skip_special_tokens": False, "temperature": temperature,
        "sampling_params": {"max_tokens": 0},
    }  # fmt: skip
    choices = post(teacher, payload)["choices"]
    assert len(choices) == len(SEQUENCES)
    for choice, tokens in zip(choices, SEQUENCES, strict=True):
        listed = choice["prompt_logprobs"]
        assert len(listed) == len(tokens) and listed[0] is None
        for position, entry in enumerate(listed[1:], 1):
            ids_K = [int(token) for token in entry][:TOP_K]
            logprobs_K = [float(value["logprob"]) for value in entry.values()][:TOP_K]
            row_V = truth_of(tokens, temperature)[position - 1]
            best = [token for token in np.argsort(-row_V, kind="stable")[:TOP_K].tolist() if token != tokens[position]]
            assert ids_K == [tokens[position], *best][:TOP_K]
            np.testing.assert_allclose(logprobs_K, row_V[ids_K], rtol=4e-3, atol=4e-3)


def test_lm_evals_local_completions(teacher: TeacherProcess) -> None:
    """lm_eval 0.4.13, models/openai_completions.py, `LocalCompletionsAPI`: the sum over a continuation, and whether it
    is what the model would have said, by equality of floats."""
    greedy = list(SEQUENCES[0])
    for _ in range(4):
        greedy.append(int(truth_of(greedy)[-1].argmax()))
    prompts, context_lengths = [greedy, SEQUENCES[2]], [len(SEQUENCES[0]), 20]
    payload = {
        "model": teacher.model, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
        "echo": True,
    }  # fmt: skip
    found = []
    choices = sorted(post(teacher, payload)["choices"], key=lambda choice: choice["index"])
    for choice, length in zip(choices, context_lengths, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        is_greedy = all(value == max(top.values()) for value, top in zip(logprobs, tops, strict=True))
        found.append((sum(logprobs), is_greedy))
    for (total, is_greedy), tokens, length in zip(found, prompts, context_lengths, strict=True):
        truth_RV = truth_of(tokens)[length - 1 : -1]
        continuation = np.array(tokens[length:])
        assert total == pytest.approx(truth_RV[np.arange(len(continuation)), continuation].sum(), abs=1e-3)
        assert is_greedy == bool((truth_RV.argmax(axis=1) == continuation).all())
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_rllms_logprobs_of_a_prompt(teacher: TeacherProcess) -> None:
    """rLLM: `echo` with `logprobs: 1`, `max_tokens: 1`; `token_logprobs` up to `usage.prompt_tokens`."""
    tokens = SEQUENCES[2]
    body = post(teacher, {"model": teacher.model, "prompt": tokens, "max_tokens": 1, "echo": True, "logprobs": 1})
    count = body["usage"]["prompt_tokens"]
    assert count == len(tokens) and body["usage"]["completion_tokens"] == 1
    logprobs = body["choices"][0]["logprobs"]["token_logprobs"][:count]
    truth_TV = truth_of(tokens)
    assert logprobs[0] is None
    np.testing.assert_allclose(logprobs[1:], truth_TV[np.arange(count - 1), tokens[1:]], atol=1e-4)
