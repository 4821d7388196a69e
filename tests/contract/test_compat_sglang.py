"""SGLang's `/generate`, held against the logits that the teacher has: what slime, miles and axolotl send and read, as
their sources have it, SGLang's own flat form, and what is refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from teacher_service.compat import sglang_fields
from teacher_service.text import JsonPieces, Text
from tests.contract.faces import VOCAB, came_of, documented, expected, truth_of
from tests.teacher_process import TeacherProcess

TOP_K = 8
RNG = np.random.default_rng(1)
SEQUENCES = [RNG.integers(0, VOCAB, length).tolist() for length in (12, 2, 30)]
IDS = SEQUENCES[0]
# Those of the K and of given ids come in fp16, at temperature 1 and again at another.
HALF = {"rtol": 2e-3, "atol": 2e-3}


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess() as process:
        yield process


def ask(teacher: TeacherProcess, payload: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{teacher.url}/generate", json=payload, timeout=60)


def post(teacher: TeacherProcess, payload: dict[str, Any]) -> Any:
    response = ask(teacher, payload)
    assert response.status_code == 200, response.text
    return response.json()


def scored(**fields: Any) -> dict[str, Any]:
    """A request for the logprobs of all of `IDS`, unless other fields are given."""
    return {
        "input_ids": IDS, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0,
    } | fields  # fmt: skip


@pytest.mark.parametrize(
    ("temperature", "at"),
    [pytest.param(0, 1.0, id="slime"), *(pytest.param(t, t, id=f"miles-{t}") for t in (1.0, 0.7))],
)
@pytest.mark.parametrize("response_length", [1, 5])
def test_on_policy_distillation_of_slime_and_miles(
    teacher: TeacherProcess, temperature: float, at: float, response_length: int
) -> None:
    """slime, slime/rollout/on_policy_distillation.py (temperature 0), and miles, examples/on_policy_distillation
    (`rollout_temperature`): `reward_func` sends a sample, `post_process_rewards` reads the end of it."""
    payload = {
        "input_ids": IDS, "return_logprob": True, "logprob_start_len": 0,
        "sampling_params": {"temperature": temperature, "max_new_tokens": 0, "skip_special_tokens": False},
    }  # fmt: skip
    reward = post(teacher, payload)
    logprobs = [item[0] for item in reward["meta_info"]["input_token_logprobs"][1:]][-response_length:]
    np.testing.assert_allclose(logprobs, came_of(IDS, at)[-response_length:], atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_axolotls_online_distillation_against_sglang(teacher: TeacherProcess, temperature: float) -> None:
    """axolotl 0.19.0, integrations/kd/collator_online_teacher.py, `fetch_online_logprobs_sglang`: a list of items as
    long as the batch, null at the first position and lists of three at every other."""
    payload = {
        "input_ids": SEQUENCES, "return_logprob": True, "top_logprobs_num": TOP_K, "logprob_start_len": 0,
        "return_text_in_logprobs": True, "echo": True,
        "sampling_params": {"max_new_tokens": 0, "temperature": temperature, "skip_special_tokens": False},
    }  # fmt: skip
    items = post(teacher, payload)
    assert isinstance(items, list) and len(items) == len(SEQUENCES)
    for item, tokens in zip(items, SEQUENCES, strict=True):
        listed = item.pop("meta_info").pop("input_top_logprobs")
        assert len(listed) == len(tokens) and listed[0] is None
        for row_V, entry in zip(truth_of(tokens, temperature)[:-1], listed[1:], strict=True):
            assert all(isinstance(triple, list) and len(triple) == 3 for triple in entry)
            logprobs_K, ids_K, _ = (list(column) for column in zip(*entry, strict=True))
            assert ids_K == np.argsort(-row_V, kind="stable")[:TOP_K].tolist()
            np.testing.assert_allclose(logprobs_K, row_V[ids_K], **HALF)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("start", "top_k"), [(0, 3), (4, 3), (11, 1), (12, 3), (-1, 3)])
def test_the_flat_form_holds_what_the_lists_hold(
    teacher: TeacherProcess, start: int, top_k: int, temperature: float
) -> None:
    """Read as SGLang's own test of it does, test_flat_raw_top_logprobs.py."""
    params = {"max_new_tokens": 0, "temperature": temperature}
    fields = scored(logprob_start_len=start, top_logprobs_num=top_k, sampling_params=params)
    lists = post(teacher, fields)["meta_info"]
    plain = post(teacher, fields | {"return_flat_raw_top_logprobs": True})["meta_info"]
    packed = post(teacher, fields | {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True})[
        "meta_info"
    ]
    listed = len(IDS) - (start if start >= 0 else len(IDS))
    assert [triple[1] for triple in lists["input_token_logprobs"]] == IDS[len(IDS) - listed :]
    assert len(lists["input_top_logprobs"]) == listed and "input_top_logprobs" not in plain | packed
    rows = [row for row in lists["input_top_logprobs"] if row is not None]
    null_prefix = min(listed, 1)
    for flat in (plain, packed):
        assert flat["input_top_logprobs_shape"] == [listed, top_k]
        assert flat["input_top_logprobs_null_prefix"] == null_prefix
    arrays = []
    for name, dtype in (("val", "float32"), ("idx", "int32")):
        member = f"input_top_logprobs_{name}_flat"
        assert packed[f"{member}_b64_dtype"] == dtype
        raw = base64.b64decode(packed[f"{member}_b64"], validate=True)
        arrays.append(np.frombuffer(raw, dtype).reshape(listed - null_prefix, top_k))
        np.testing.assert_array_equal(np.array(plain[member], dtype).reshape(-1, top_k), arrays[-1])
    values_RK, ids_RK = arrays
    assert ids_RK.tolist() == [[triple[1] for triple in row] for row in rows]
    truth_RV = truth_of(IDS, temperature)[len(IDS) - listed : -1]
    np.testing.assert_allclose(values_RK, np.take_along_axis(truth_RV, ids_RK, axis=1), **HALF)
    for row, values_K in zip(rows, values_RK, strict=True):
        np.testing.assert_allclose([triple[0] for triple in row], values_K, rtol=1e-4)


def test_no_logprob_in_json_is_below_that_of_minus_infinity(teacher: TeacherProcess) -> None:
    fields = scored(top_logprobs_num=256, sampling_params={"max_new_tokens": 0, "temperature": 0.001})
    lists = post(teacher, fields)["meta_info"]
    flat = post(teacher, fields | {"return_flat_raw_top_logprobs": True})["meta_info"]
    values = [triple[0] for row in lists["input_top_logprobs"][1:] for triple in row]
    assert min(values) == min(flat["input_top_logprobs_val_flat"]) == -9999
    np.testing.assert_allclose(values, flat["input_top_logprobs_val_flat"], rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 2])
def test_given_ids_are_scored_at_every_position_and_a_token_is_written(
    teacher: TeacherProcess, top_k: int, temperature: float
) -> None:
    each = [[3, 400, 3], [0], [511, 7]]
    starts = [0, 1, 25]
    payload = scored(
        input_ids=SEQUENCES, token_ids_logprob=each, top_logprobs_num=top_k, logprob_start_len=starts,
        sampling_params={"max_new_tokens": 1, "temperature": temperature},
    )  # fmt: skip
    items = post(teacher, payload)
    for item, tokens, ids, start in zip(items, SEQUENCES, each, starts, strict=True):
        truth_TV, meta = truth_of(tokens, temperature), item["meta_info"]
        best = int(truth_TV[-1].argmax())
        assert item["output_ids"] == [best] and meta["completion_tokens"] == 1
        assert meta["finish_reason"] == {"type": "length", "length": 1} and meta["prompt_tokens"] == len(tokens)
        [[value, token, _]] = meta["output_token_logprobs"]
        assert token == best and value == pytest.approx(truth_TV[-1, best], rel=2e-3, abs=2e-3)
        inside, out = meta["input_token_ids_logprobs"], meta["output_token_ids_logprobs"]
        assert inside[0] is None and len(inside) == len(tokens) - start and len(out) == 1
        rows = np.array([[triple[0] for triple in row] for row in inside[1:] + out])
        np.testing.assert_allclose(rows, truth_TV[start:][:, ids], **HALF)
        assert all([triple[1] for triple in row] == ids for row in inside[1:] + out)
        assert ("input_top_logprobs" in meta) == ("output_top_logprobs" in meta) == bool(top_k)
    same = post(teacher, scored(token_ids_logprob=[3, 400]))["meta_info"]["input_token_ids_logprobs"]
    rows = [[triple[0] for triple in row] for row in same[1:]]
    np.testing.assert_allclose(rows, truth_of(IDS)[:-1][:, [3, 400]], **HALF)


def test_without_logprobs_a_token_is_written_alone(teacher: TeacherProcess) -> None:
    answer = post(teacher, {"input_ids": IDS, "sampling_params": {"max_new_tokens": 1, "temperature": 0}})
    assert answer["output_ids"] == [int(truth_of(IDS)[-1].argmax())]
    assert not [name for name in answer["meta_info"] if "logprob" in name]
    assert post(teacher, scored(input_ids=[IDS]))[0]["meta_info"]["input_token_logprobs"][0] == [None, IDS[0], None]


def test_tokens_have_their_text_where_there_is_a_tokenizer(tiny_llama: Path) -> None:
    text = Text(tiny_llama, Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).get_vocab_size())
    pieces = JsonPieces(text)
    for token, string in enumerate(text.strings()):
        assert json.loads(b"[0" + pieces.named_ends[token]) == [0, token, string]
        assert json.loads(b"[0" + pieces.plain_ends[token]) == [0, token, None]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"sampling_params": {"max_new_tokens": 2}}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {}, "return_logprob": False}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"max_new_tokens": 0, "n": 2}}, "sampling_params.n"),
        ({"sampling_params": {"max_new_tokens": 0, "regex": "a"}}, "sampling_params.regex"),
        ({"sampling_params": {"max_new_tokens": 0, "max_tokens": 1}}, "sampling_params.max_tokens"),
        ({"sampling_params": {"max_new_tokens": 0, "temperature": -1}}, "sampling_params.temperature"),
        ({"sampling_params": {"max_new_tokens": 0, "temperature": 1e-5}}, "sampling_params.temperature"),
        ({"sampling_params": {"max_new_tokens": 0, "temperature": 10**400}}, "sampling_params.temperature"),
        ({"sampling_params": [{"max_new_tokens": 0}]}, "sampling_params"),
        ({"stream": True}, "stream"),
        ({"image_data": ["a"]}, "image_data"),
        ({"temperature": 1}, "temperature"),
        ({"input_ids": ...}, "input_ids"),
        ({"input_ids": [VOCAB]}, "input_ids.0"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[1], []]}, "input_ids.1"),
        ({"input_ids": [2**70]}, "input_ids"),
        ({"logprob_start_len": len(IDS) + 1}, "logprob_start_len"),
        ({"logprob_start_len": [0, 0]}, "logprob_start_len"),
        ({"top_logprobs_num": 257}, "top_logprobs_num"),
        ({"top_logprobs_num": 1, "return_logprob": False}, "top_logprobs_num"),
        ({"return_flat_raw_top_logprobs_b64": True}, "return_flat_raw_top_logprobs_b64"),
        ({"token_ids_logprob": [VOCAB]}, "token_ids_logprob.0"),
        ({"token_ids_logprob": [2**70]}, "token_ids_logprob"),
        ({"token_ids_logprob": [[]]}, "token_ids_logprob"),
        ({"token_ids_logprob": [[1], [2]]}, "token_ids_logprob"),
        ({"token_ids_logprob": [1] * 257}, "token_ids_logprob"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(teacher: TeacherProcess, changed: dict[str, Any], field: str) -> None:
    response = ask(teacher, {name: value for name, value in scored(**changed).items() if value is not ...})
    assert response.status_code == 422, response.text
    assert response.json()["field"] == field


def test_an_answer_that_could_never_be_admitted_is_refused(teacher: TeacherProcess) -> None:
    payload = scored(input_ids=[[1] * 1000] * 30, top_logprobs_num=256, token_ids_logprob=list(range(256)))
    response = ask(teacher, payload)
    assert response.status_code == 422 and "/v1/targets in msgpack" in response.json()["message"]


def test_the_documentation_says_of_every_field_what_becomes_of_it() -> None:
    """Each row of the table in docs/api.md against the tables of the code."""
    said = documented("/generate")
    theirs = sglang_fields
    ignored = [*theirs.WITHOUT_EFFECT.values(), *theirs.SAMPLING_WITHOUT_EFFECT.values()]
    read = [*theirs.GenerateRequest.model_fields, *theirs.SamplingParams.model_fields]
    begins = expected(read, ignored, [*theirs.NEUTRAL, *theirs.SAMPLING_NEUTRAL])
    assert said.keys() == begins.keys()
    for name, start in begins.items():
        assert said[name].startswith(start), name
