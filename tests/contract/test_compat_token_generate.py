"""vLLM's `/inference/v1/generate`, held against the logits that the teacher has: what prime-rl, vime and verl send and
read, as their sources have it, and what is refused.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from teacher_service.compat import token_fields
from tests.contract.faces import VOCAB, came_of, documented, expected, truth_of
from tests.teacher_process import TeacherProcess

RNG = np.random.default_rng(1)
IDS = RNG.integers(0, VOCAB, 20).tolist()
# Those of given ids come in fp16, at temperature 1 and again at another.
HALF = {"rtol": 2e-3, "atol": 2e-3}


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess() as process:
        yield process


def ask(teacher: TeacherProcess, payload: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{teacher.url}/inference/v1/generate", json=payload, timeout=60)


def post(teacher: TeacherProcess, payload: dict[str, Any]) -> dict[str, Any]:
    response = ask(teacher, payload)
    assert response.status_code == 200, response.text
    return response.json()


def given(answer: dict[str, Any]) -> np.ndarray:
    """Read as vLLM's documentation has it."""
    raw = base64.b64decode(answer["prompt_token_id_logprobs"], validate=True)
    return np.load(io.BytesIO(raw), allow_pickle=False)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_prime_rls_prefill(teacher: TeacherProcess, temperature: float) -> None:
    """prime-rl, orchestrator/clients.py, `prefill_logprobs` (it sends temperature 1): 0 for the first token, then by
    its version the first entry of each position or the entry of the token's id, and the largest."""
    params = {"max_tokens": 1, "temperature": temperature, "top_p": 1.0, "prompt_logprobs": 1}
    answer = post(teacher, {"model": teacher.model, "token_ids": IDS, "sampling_params": params})
    listed = answer["prompt_logprobs"]
    assert listed[0] is None and len(listed) == len(IDS)
    first = [0.0] + [next(iter(entry.values()))["logprob"] for entry in listed[1:]]
    by_id = [0.0] + [entry[str(token)]["logprob"] for entry, token in zip(listed[1:], IDS[1:], strict=True)]
    assert first == by_id
    np.testing.assert_allclose(first[1:], came_of(IDS, temperature), atol=1e-4)
    largest = [max(value["logprob"] for value in entry.values()) for entry in listed[1:]]
    np.testing.assert_allclose(largest, truth_of(IDS, temperature)[:-1].max(axis=1), **HALF)
    [choice] = answer["choices"]
    assert choice["token_ids"] == [int(truth_of(IDS)[-1].argmax())] and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21}


@pytest.mark.parametrize("response_length", [1, 7, len(IDS) - 1])
def test_vimes_scores_of_the_response(teacher: TeacherProcess, response_length: int) -> None:
    """vime, rollout/on_policy_distillation.py, `per-position`, at its `rollout_temperature`: the token that came as the
    only id of each row, read as a float32 array of the response's length that is finite and not above 0."""
    prompt_length = len(IDS) - response_length
    params = {
        "temperature": 0.7, "max_tokens": 1, "skip_special_tokens": False, "prompt_logprob_start": prompt_length - 1,
        "prompt_logprob_token_ids": [[token] for token in IDS[prompt_length:]],
    }  # fmt: skip
    scores = given(post(teacher, {"token_ids": IDS, "sampling_params": params}))
    assert scores.dtype == np.float32 and scores.shape == (response_length, 1)
    assert np.isfinite(scores).all() and (scores <= 0).all()
    np.testing.assert_allclose(scores[:, 0], came_of(IDS, 0.7)[-response_length:], atol=1e-4)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("also", [{}, {"prompt_logprobs": 0}, {"prompt_logprobs": 4}])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_verls_scores_of_the_students_top_k(
    teacher: TeacherProcess, temperature: float, also: dict[str, int], max_tokens: int
) -> None:
    """verl, `reverse_kl_topk`: the student's K ids of each token of the response, from `prompt_length` - 1 on."""
    prompt_length, top_k = 6, 5
    ids_RK = RNG.integers(0, VOCAB, (len(IDS) - prompt_length, top_k))
    params = {
        "max_tokens": max_tokens, "temperature": temperature, "prompt_logprob_token_ids": ids_RK.tolist(),
        "prompt_logprob_start": prompt_length - 1,
    }  # fmt: skip
    answer = post(teacher, {"token_ids": IDS, "sampling_params": params | also})
    scores_RK = given(answer)
    assert scores_RK.shape == ids_RK.shape and scores_RK.dtype == np.float32
    truth_RV = truth_of(IDS, temperature)[prompt_length - 1 : -1]
    np.testing.assert_allclose(scores_RK, np.take_along_axis(truth_RV, ids_RK, axis=1), **HALF)
    assert (answer["prompt_logprobs"] is not None) == bool(also)
    if also:
        came = [next(iter(entry.values()))["logprob"] for entry in answer["prompt_logprobs"][1:]]
        np.testing.assert_allclose(came, came_of(IDS, temperature), atol=1e-4)


def test_padded_and_ragged_rows_score_minus_infinity(teacher: TeacherProcess) -> None:
    tokens = [5, 7, 300]
    for rows in ([[3, -1, 7], [300, -1, -1]], [[3, -1, 7], [300]]):
        scores = given(post(teacher, {"token_ids": tokens, "sampling_params": {"prompt_logprob_token_ids": rows}}))
        truth = truth_of(tokens)
        expected = [[truth[0, 3], -np.inf, truth[0, 7]], [truth[1, 300], -np.inf, -np.inf]]
        np.testing.assert_allclose(scores, expected, **HALF)
        assert scores[0, 2] == pytest.approx(truth[0, 7], abs=1e-4), "the token that came is in fp32"


def test_the_written_token_has_its_logprobs(teacher: TeacherProcess) -> None:
    row_V = truth_of(IDS)[-1]
    best = np.argsort(-row_V, kind="stable")
    for asked in (0, 1, 3):
        payload = {"token_ids": IDS, "sampling_params": {"max_tokens": 1, "logprobs": asked}, "return_token_ids": True}
        answer = post(teacher, payload)
        assert answer["prompt_token_ids"] == IDS and answer["prompt_logprobs"] is None
        [content] = answer["choices"][0]["logprobs"]["content"]
        assert content["token_id"] == best[0] and content["rank"] == 1
        assert [top["token_id"] for top in content["top_logprobs"]] == best[: max(asked, 1)].tolist()
        values = [top["logprob"] for top in content["top_logprobs"]]
        np.testing.assert_allclose(values, row_V[best[: max(asked, 1)]], **HALF)


ROWS = [[1]] * (len(IDS) - 1)


@pytest.mark.parametrize(
    ("changed", "params", "status", "field"),
    [
        ({"model": "another"}, {}, 404, "model"),
        ({"token_ids": []}, {"prompt_logprobs": 1}, 422, "token_ids"),
        ({"token_ids": [VOCAB]}, {"prompt_logprobs": 1}, 422, "token_ids"),
        ({"token_ids": [[1]]}, {}, 422, "token_ids"),
        ({"token_ids": [2**70]}, {}, 422, "token_ids"),
        ({"stream": True}, {}, 422, "stream"),
        ({"output_mode": "text"}, {}, 422, "output_mode"),
        ({"prompt": "a"}, {}, 422, "prompt"),
        ({}, {"max_tokens": 2}, 422, "sampling_params.max_tokens"),
        ({}, {"max_tokens": None}, 422, "sampling_params.max_tokens"),
        ({}, {"n": 2}, 422, "sampling_params.n"),
        ({}, {"n": True}, 422, "sampling_params.n"),
        ({}, {"best_of": 1}, 422, "sampling_params.best_of"),
        ({}, {"prompt_logprobs": -1}, 422, "sampling_params.prompt_logprobs"),
        ({}, {"prompt_logprobs": 257}, 422, "sampling_params.prompt_logprobs"),
        ({}, {"prompt_logprobs": 1, "temperature": 1e-5}, 422, "sampling_params.temperature"),
        ({}, {"prompt_logprobs": 1, "temperature": 10**400}, 422, "sampling_params.temperature"),
        ({}, {"prompt_logprob_start": 0}, 422, "sampling_params.prompt_logprob_start"),
        ({}, {"prompt_logprob_start": -1}, 422, "sampling_params.prompt_logprob_start"),
        ({}, {"prompt_logprob_token_ids": []}, 422, "sampling_params.prompt_logprob_token_ids"),
        ({}, {"prompt_logprob_token_ids": ROWS[1:]}, 422, "sampling_params.prompt_logprob_token_ids"),
        ({}, {"prompt_logprob_token_ids": ROWS, "prompt_logprob_start": 1}, 422,
         "sampling_params.prompt_logprob_token_ids"),
        ({}, {"prompt_logprob_token_ids": [[]] * len(ROWS)}, 422, "sampling_params.prompt_logprob_token_ids"),
        ({}, {"prompt_logprob_token_ids": [[1] * 257] * len(ROWS)}, 422, "sampling_params.prompt_logprob_token_ids"),
        ({}, {"prompt_logprob_token_ids": [[VOCAB]] * len(ROWS)}, 422, "sampling_params.prompt_logprob_token_ids"),
        ({}, {"prompt_logprob_token_ids": [[-2]] * len(ROWS)}, 422, "sampling_params.prompt_logprob_token_ids"),
        ({"token_ids": [1]}, {"prompt_logprob_token_ids": [[1]]}, 422, "sampling_params.prompt_logprob_token_ids"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(
    teacher: TeacherProcess, changed: dict[str, Any], params: dict[str, Any], status: int, field: str
) -> None:
    response = ask(teacher, {"token_ids": IDS, "sampling_params": {"max_tokens": 1} | params} | changed)
    assert response.status_code == status, response.text
    assert response.json()["field"].startswith(field)


def test_the_documentation_says_of_every_field_what_becomes_of_it() -> None:
    """Each row of the table in docs/api.md against the tables of the code."""
    said = documented("/inference/v1/generate")
    theirs = token_fields
    ignored = [*theirs.WITHOUT_EFFECT.values(), *theirs.SAMPLING_WITHOUT_EFFECT.values()]
    read = [*theirs.TokenRequest.model_fields, *theirs.SamplingParams.model_fields]
    begins = expected(read, ignored, [*theirs.NEUTRAL, *theirs.SAMPLING_NEUTRAL])
    assert said.keys() == begins.keys()
    for name, start in begins.items():
        assert said[name].startswith(start), name


@pytest.mark.vllm
def test_every_field_of_vllms_request_is_known_and_the_answer_is_one_of_its_own(teacher: TeacherProcess) -> None:
    import msgspec
    from vllm import SamplingParams
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest, GenerateTokensResponse

    theirs = token_fields
    known = {*theirs.TokenRequest.model_fields, *theirs.NEUTRAL}
    known |= {name for names in theirs.WITHOUT_EFFECT.values() for name in names}
    assert set(GenerateRequest.model_fields) <= known
    known = {*theirs.SamplingParams.model_fields, *theirs.SAMPLING_NEUTRAL}
    known |= {name for names in theirs.SAMPLING_WITHOUT_EFFECT.values() for name in names}
    fields = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}
    assert {name for name in fields if not name.startswith("_")} <= known
    for name, neutral in theirs.SAMPLING_NEUTRAL.items():
        assert fields[name] is None or fields[name] in neutral, f"{name} is neutral at what vLLM takes it for"
    params = {"max_tokens": 1, "prompt_logprobs": 2, "logprobs": 2, "prompt_logprob_token_ids": ROWS}
    payload = {"token_ids": IDS, "sampling_params": params}
    GenerateRequest.model_validate(payload)
    answer = GenerateTokensResponse.model_validate(post(teacher, payload))
    assert answer.prompt_logprobs is not None and set(answer.prompt_logprobs[1]) >= {IDS[1]}
