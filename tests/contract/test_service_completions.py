"""The compatible face: vLLM's JSON for prompt_logprobs and echo, held against the logits that the teacher has."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from teacher_proto.targets import TokenTargets
from teacher_service.compat.completion_fields import NEUTRAL, WITHOUT_EFFECT, CompletionRequest
from teacher_service.compat.completion_json import next_token_logprobs, openai_logprobs
from teacher_service.engines.scripted_model import scripted_logits
from teacher_service.text import Text
from tests.chaos.crowd import lag_of
from tests.contract.faces import documented, expected
from tests.teacher_process import TeacherProcess

VOCAB = 512
IDS = [5, 7, 300, 7, 12, 511, 0]


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess() as process:
        yield process


@pytest.fixture(scope="module")
def lettered(tiny_llama: Path) -> Iterator[TeacherProcess]:
    """A teacher with a tokenizer, served by transformers."""
    with TeacherProcess(str(tiny_llama), "--engine", "hf", "--dtype", "float32") as process:
        yield process


def complete(teacher: TeacherProcess, **fields: Any) -> dict[str, Any]:
    """`max_tokens` is 0 unless it is given; ... leaves it out."""
    response = httpx.post(
        f"{teacher.url}/v1/completions", json=without_ellipsis({"max_tokens": 0} | fields), timeout=60
    )
    assert response.status_code == 200, response.text
    return response.json()


def without_ellipsis(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not ...}


def logprobs_of(tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    logits = scripted_logits(np.array(tokens), VOCAB).astype(np.float64) / temperature
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("top_k", [1, 5, 64, 256])
def test_prompt_logprobs_hold_the_most_likely_and_the_token_that_came(teacher: TeacherProcess, top_k: int) -> None:
    body = complete(teacher, prompt=IDS, prompt_logprobs=top_k)
    listed = body["choices"][0]["prompt_logprobs"]
    truth = logprobs_of(IDS)
    assert len(listed) == len(IDS) and listed[0] is None
    for position in range(1, len(IDS)):
        row, entry = truth[position - 1], listed[position]
        best = np.argsort(-row, kind="stable")[:top_k]
        assert set(map(int, entry)) == {*best.tolist(), IDS[position]}
        for token, value in entry.items():
            assert value["logprob"] == pytest.approx(row[int(token)], rel=2e-3, abs=1e-3)
            rank = int((row > row[int(token)]).sum()) + 1
            assert value["rank"] == min(rank, top_k + 1)
        # The token that came stands first, the others by rank.
        others = [token for token in best.tolist() if token != IDS[position]]
        assert list(map(int, entry)) == [IDS[position], *others]
        came = next(iter(entry.values()))["logprob"]
        assert came == pytest.approx(row[IDS[position]], abs=1e-4), "in fp32, whether it is among the K or not"
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}


def test_prompt_logprobs_of_0_list_the_token_that_came_alone(teacher: TeacherProcess) -> None:
    listed = complete(teacher, prompt=IDS, prompt_logprobs=0)["choices"][0]["prompt_logprobs"]
    assert [list(map(int, entry)) for entry in listed[1:]] == [[token] for token in IDS[1:]]
    for position in range(1, len(IDS)):
        value = listed[position][str(IDS[position])]["logprob"]
        assert value == pytest.approx(logprobs_of(IDS)[position - 1, IDS[position]], abs=1e-4)


def test_echo_gives_openai_logprobs_for_every_token_of_the_prompt(teacher: TeacherProcess) -> None:
    choice = complete(teacher, prompt=IDS, echo=True, logprobs=3)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in IDS]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    truth = logprobs_of(IDS)
    for position in range(1, len(IDS)):
        top = logprobs["top_logprobs"][position]
        best = np.argsort(-truth[position - 1], kind="stable")[:3].tolist()
        assert set(top) == {f"token_id:{token}" for token in {*best, IDS[position]}}
        assert logprobs["token_logprobs"][position] == pytest.approx(truth[position - 1, IDS[position]], rel=2e-3)
    assert logprobs["text_offset"] == np.cumsum([0, *map(len, logprobs["tokens"][:-1])]).tolist()
    assert len(choice["prompt_logprobs"]) == len(IDS)


def test_one_token_asked_for_is_the_most_likely_one(teacher: TeacherProcess) -> None:
    body = complete(teacher, prompt=IDS, max_tokens=1, prompt_logprobs=2, return_token_ids=True, temperature=0)
    choice = body["choices"][0]
    assert choice["token_ids"] == [int(logprobs_of(IDS)[-1].argmax())]
    assert choice["prompt_token_ids"] == IDS and choice["finish_reason"] == "length"
    alone = complete(teacher, prompt=IDS, max_tokens=1, logprobs=2)["choices"][0]["logprobs"]
    assert alone["token_logprobs"] == [pytest.approx(logprobs_of(IDS)[-1].max(), rel=2e-3, abs=1e-3)]


def test_an_echo_ends_with_the_token_that_is_written(teacher: TeacherProcess) -> None:
    best = logprobs_of(IDS)[-1]
    for asked in (0, 2):
        logprobs = complete(teacher, prompt=IDS, max_tokens=1, echo=True, logprobs=asked)["choices"][0]["logprobs"]
        assert logprobs["tokens"][-1] == f"token_id:{best.argmax()}" and len(logprobs["tokens"]) == len(IDS) + 1
        assert logprobs["token_logprobs"][-1] == pytest.approx(best.max(), rel=2e-3, abs=1e-3)


def test_of_tokens_with_one_name_the_first_listed_keeps_it() -> None:
    """Parts of a character all decode to the same sign. The token that came is listed first, then those by rank."""

    class Signs(Text):
        def strings(self) -> list[str]:
            return ["a", "\ufffd", "\ufffd", "\ufffd"]

    targets = TokenTargets(
        start=0, ids=np.array([[1, 2, 3], [2, 3, 0]], np.uint16), next_logprob=np.array([-0.5, np.nan], np.float32),
        logprobs=np.array([[-0.5, -1.5, -3], [-0.25, -2, -4]], np.float16),
    )  # fmt: skip
    text = Signs(None, 4)
    echoed = json.loads(b"".join(openai_logprobs(np.array([0, 1]), targets, 3, text, as_ids=False, generated=2)))
    assert echoed["tokens"] == ["a", "\ufffd", "\ufffd"]
    assert echoed["top_logprobs"] == [None, {"\ufffd": -0.5}, {"\ufffd": -0.25, "a": -4}]
    alone = json.loads(b"".join(next_token_logprobs(targets, 2, 3, text, as_ids=False)))
    assert alone["top_logprobs"] == [{"\ufffd": -0.25, "a": -4}]


@pytest.mark.parametrize("top_k", [0, 4])
def test_the_token_that_came_has_all_digits_of_fp32(teacher: TeacherProcess, top_k: int) -> None:
    scored = httpx.post(f"{teacher.url}/v1/targets", json={"sequences": [IDS], "kinds": ["score"]}).json()
    exact = np.array(scored["sequences"][0]["next_logprob"][:-1], np.float32)
    listed = complete(teacher, prompt=IDS, prompt_logprobs=top_k)["choices"][0]["prompt_logprobs"]
    came = [next(iter(entry.values()))["logprob"] for entry in listed[1:]]
    np.testing.assert_array_equal(np.array(came, np.float32), exact)
    payload = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True,
               "logprob_start_len": 0, "top_logprobs_num": top_k}  # fmt: skip
    meta = httpx.post(f"{teacher.url}/generate", json=payload).json()["meta_info"]
    came = [triple[0] for triple in meta["input_token_logprobs"][1:]]
    np.testing.assert_array_equal(np.array(came, np.float32), exact)


def test_several_prompts_give_choices_in_their_order(teacher: TeacherProcess) -> None:
    prompts = [[n] * (n + 2) for n in range(1, 20)]
    choices = complete(teacher, prompt=prompts, prompt_logprobs=1)["choices"]
    assert [choice["index"] for choice in choices] == list(range(19))
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5])
@pytest.mark.parametrize("top_k", [0, 1, 8, 64])
def test_prompt_logprobs_are_exact_at_the_temperature_that_is_asked_for(
    teacher: TeacherProcess, temperature: float, top_k: int
) -> None:
    listed = complete(teacher, prompt=IDS, prompt_logprobs=top_k, temperature=temperature)["choices"][0][
        "prompt_logprobs"
    ]
    truth = logprobs_of(IDS, temperature)
    for position in range(1, len(IDS)):
        row, entry = truth[position - 1], listed[position]
        best = np.argsort(-row, kind="stable")[:top_k]
        assert set(map(int, entry)) == {*best.tolist(), IDS[position]}
        for token, value in entry.items():
            # A logprob comes in fp16, at temperature 1 and again at this one.
            assert value["logprob"] == pytest.approx(row[int(token)], rel=4e-3, abs=4e-3)
        assert next(iter(entry.values()))["logprob"] == pytest.approx(row[IDS[position]], abs=1e-4)


def test_temperatures_of_0_and_1_are_the_teachers_own_and_logprobs_have_none(teacher: TeacherProcess) -> None:
    def answer(**fields: Any) -> Any:
        choice = complete(teacher, prompt=IDS, prompt_logprobs=4, echo=True, logprobs=4, **fields)["choices"][0]
        return choice["prompt_logprobs"], choice["logprobs"]

    own = answer()
    assert answer(temperature=0) == answer(temperature=1.0) == answer(temperature=None) == own
    listed, logprobs = answer(temperature=3.0)
    assert logprobs == own[1] and listed != own[0]


def test_a_scored_prompt_needs_no_max_tokens_and_flags_are_numbers_as_vllm_reads_them(teacher: TeacherProcess) -> None:
    asked = complete(teacher, prompt=IDS, prompt_logprobs=3)["choices"]
    assert complete(teacher, prompt=IDS, prompt_logprobs=3, max_tokens=...)["choices"] == asked
    echoed = complete(teacher, prompt=IDS, echo=True, logprobs=1)["choices"]
    assert complete(teacher, prompt=IDS, echo=True, logprobs=True, max_tokens=...)["choices"] == echoed


def test_what_clients_of_vllm_send_along_is_passed_over(teacher: TeacherProcess) -> None:
    plain = complete(teacher, prompt=IDS, prompt_logprobs=1, max_tokens=1)["choices"]
    for extra in ({"top_p": 0.9, "seed": 1, "user": "me"}, {"detokenize": False, "n": 1},
                  {"model": "scripted", "stream": False, "stop": None, "ignore_eos": True},
                  {"sampling_params": {"max_tokens": 0}, "max_new_tokens": 0, "top_logprobs": 20}):  # fmt: skip
        assert complete(teacher, prompt=IDS, prompt_logprobs=1, max_tokens=1, **extra)["choices"] == plain
    complete(teacher, prompt=IDS, prompt_logprobs=1, temperature=0.7, top_p=0.9, seed=1, user="me")


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "sampling sixteen": ({"max_tokens": 16}, 422, "max_tokens"),
    "max_tokens left at vLLM's 16": ({"max_tokens": None}, 422, "max_tokens"),
    "several samples": ({"n": 2}, 422, "n"),
    "a stream": ({"stream": True}, 422, "stream"),
    "a bias": ({"logit_bias": {"1": 5}}, 422, "logit_bias"),
    "structured output": ({"structured_outputs": {"regex": "a*"}}, 422, "structured_outputs"),
    "the whole vocabulary": ({"prompt_logprobs": -1}, 422, "prompt_logprobs"),
    "too many": ({"prompt_logprobs": 257}, 422, "prompt_logprobs"),
    "a flag for a number": ({"prompt_logprobs": True}, 422, "prompt_logprobs"),
    "text without a tokenizer": ({"prompt": "hello"}, 422, "prompt"),
    "an empty prompt": ({"prompt": []}, 422, "prompt"),
    "an id beyond the vocabulary": ({"prompt": [1, 512]}, 422, "prompt.0"),
    "a negative id": ({"prompt": [-1]}, 422, "prompt"),
    "another model": ({"model": "gpt-4"}, 404, "model"),
    "sampling by leaving it to vLLM": ({"max_tokens": ..., "prompt_logprobs": ...}, 422, "max_tokens"),
    "a field of nobody's": ({"promt_logprobs": 1}, 422, "promt_logprobs"),
    "a penalty": ({"repetition_penalty": 1.2}, 422, "repetition_penalty"),
    "a flag for a count": ({"n": True}, 422, "n"),
    "a negative temperature": ({"temperature": -1}, 422, "temperature"),
    "a temperature near nought": ({"temperature": 1e-6}, 422, "temperature"),
    "a temperature beyond floats": ({"temperature": 10**400}, 422, "temperature"),
    "a flag for a temperature": ({"temperature": True}, 422, "temperature"),
    "parameters within parameters": ({"sampling_params": {"max_tokens": 99}}, 422, "sampling_params"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_heeded_is_refused_by_name(teacher: TeacherProcess, name: str) -> None:
    fields, status, field = BAD[name]
    body = without_ellipsis({"prompt": IDS, "max_tokens": 0, "prompt_logprobs": 1} | fields)
    response = httpx.post(f"{teacher.url}/v1/completions", json=body)
    assert (response.status_code, response.json()["field"]) == (status, field)


def test_a_failing_prompt_fails_the_request() -> None:
    with TeacherProcess(script={"poison_token": 13}) as teacher:
        body = {"prompt": [[1, 2], [13]], "max_tokens": 0, "prompt_logprobs": 1}
        response = httpx.post(f"{teacher.url}/v1/completions", json=body)
        assert (response.status_code, response.json()["code"]) == (500, "engine_failed")


def test_models_are_listed_as_vllm_lists_them(teacher: TeacherProcess) -> None:
    body = httpx.get(f"{teacher.url}/v1/models").json()
    assert body["data"][0]["id"] == "scripted" and body["data"][0]["max_model_len"] == 2048
    assert httpx.get(f"{teacher.url}/health").status_code == 200


def test_text_prompts_and_decoded_tokens_come_from_the_models_tokenizer(
    lettered: TeacherProcess, tiny_llama: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    text = "The teacher is a person who helps"
    ids = tokenizer.encode(text).ids
    choice = complete(lettered, prompt=text, prompt_logprobs=4, echo=True, logprobs=4, return_token_ids=True)[
        "choices"
    ][0]
    assert choice["prompt_token_ids"] == ids and choice["text"] == tokenizer.decode(ids, skip_special_tokens=False)
    for entry in choice["prompt_logprobs"][1:]:
        for token, value in entry.items():
            assert value["decoded_token"].strip() == tokenizer.decode([int(token)], skip_special_tokens=False).strip()
    assert "".join(choice["logprobs"]["tokens"]).strip() == choice["text"].strip()


def test_texts_are_neither_cut_nor_padded_whatever_the_tokenizers_file_says(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    texts = ["a", "The teacher is a person who helps"]
    expected = [tokenizer.encode(text).ids for text in texts]
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Text(tmp_path, VOCAB).encode(texts, add_special_tokens=True) == expected


def test_the_documentation_says_of_every_field_what_becomes_of_it() -> None:
    """Each row of the table in docs/api.md against the tables of the code."""
    said = documented("/v1/completions")
    begins = expected(CompletionRequest.model_fields, WITHOUT_EFFECT.values(), NEUTRAL)
    assert len(begins) == len(CompletionRequest.model_fields) + sum(map(len, WITHOUT_EFFECT.values())) + len(NEUTRAL)
    for name, start in begins.items():
        assert said[name].startswith(start), name


@pytest.mark.vllm
def test_every_field_of_vllms_request_is_known() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest as Theirs

    ignored = {name for names in WITHOUT_EFFECT.values() for name in names}
    assert set(Theirs.model_fields) <= {*CompletionRequest.model_fields, *ignored, *NEUTRAL}
    for name, neutral in NEUTRAL.items():
        field = Theirs.model_fields.get(name)
        default = None if field is None else field.get_default(call_default_factory=True)
        assert default is None or default in neutral, f"{name} is neutral at what vLLM takes it for"


@pytest.mark.vllm
def test_the_answer_is_what_vllms_own_models_read(teacher: TeacherProcess) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    for fields in ({"prompt_logprobs": 3}, {"prompt_logprobs": 0, "max_tokens": 1}, {"echo": True, "logprobs": 2}):
        body = complete(teacher, prompt=[IDS, IDS[:3]], **fields)
        read = CompletionResponse.model_validate_json(json.dumps(body))
        assert len(read.choices) == 2
        listed = read.choices[0].prompt_logprobs
        assert listed is not None and listed[0] is None and listed[1] is not None
        assert all(isinstance(token, int) for token in listed[1])


async def test_a_long_text_is_not_tokenised_on_the_event_loop(lettered: TeacherProcess) -> None:
    text = "".join(f"w{number % 977} " for number in range(200_000))
    async with (
        httpx.AsyncClient(base_url=lettered.url, timeout=60) as client,
        httpx.AsyncClient(base_url=lettered.url, timeout=60) as prober,
    ):
        await client.post("/v1/completions", json={"prompt": "short", "max_tokens": 0})
        started = time.monotonic()
        async with lag_of(prober) as lags:
            fields = {"prompt": text, "max_tokens": 0, "prompt_logprobs": 256}
            answer = await client.post("/v1/completions", json=fields)
        took = time.monotonic() - started
    assert answer.status_code == 422 and answer.json()["field"].startswith("prompt")
    print(f"{took:.2f} s for {len(text)} bytes of text; the loop answered others {len(lags)} times, within "
          f"{1000 * max(lags):.0f} ms")  # fmt: skip
    # On the loop there would be one pause that is nearly all of the time.
    assert len(lags) >= 5 and max(lags) < max(0.05, 0.4 * took)
