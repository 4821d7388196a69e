"""Our routes for vLLM's clients against those of `vllm serve` itself, over the same model, in what trainers read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.servers import child, stock_environment, until_healthy
from tests.contract.engine_cases import reference_logits
from tests.teacher_process import TeacherProcess, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(2, 512, length).tolist() for length in (40, 2, 17)]
# Of two servers that add up in different orders, near ties may change places.
WITHIN = 1e-3


@pytest.fixture(scope="module")
def servers(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """URLs of stock vLLM and of ours, and the model's name."""
    model, port = str(tiny_llama), free_port()
    arguments = ["serve", model, "--port", str(port), "--max-logprobs", "256", "--dtype", "float32", "--enforce-eager",
                 "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**26), "--enable-scale-out"]  # fmt: skip
    environment = stock_environment(tmp_path_factory.mktemp("stub"))
    with (
        child(["vllm.entrypoints.cli.main", *arguments], environment) as process,
        TeacherProcess(model, "--engine", "hf", "--dtype", "float32") as ours,
    ):
        url = f"http://127.0.0.1:{port}"
        asyncio.run(until_healthy(url, process))
        yield url, ours.url, model


def ask(url: str, model: str, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/completions", json={"model": model, "prompt": PROMPTS} | fields, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def close(ours: float, theirs: float) -> bool:
    # The K most likely come in fp16.
    return abs(ours - theirs) <= WITHIN + 2.0**-11 * abs(theirs)


def test_prompt_logprobs_are_those_of_vllm_in_the_same_order(servers: tuple[str, str, str]) -> None:
    stock, ours, model = servers
    for top_k in (0, 1, 8, 64):
        bodies = [ask(url, model, max_tokens=1, temperature=1.0, prompt_logprobs=top_k) for url in (stock, ours)]
        theirs, mine = (body["choices"] for body in bodies)
        assert [choice["index"] for choice in mine] == [choice["index"] for choice in theirs]
        for choice, expected, prompt in zip(mine, theirs, PROMPTS, strict=True):
            listed, truth = choice["prompt_logprobs"], expected["prompt_logprobs"]
            assert len(listed) == len(truth) and listed[0] is truth[0] is None
            for position in range(1, len(listed)):
                entry, other = listed[position], truth[position]
                assert next(iter(entry)) == next(iter(other)) == str(prompt[position])
                assert len(entry) == len(other)
                assert set(next(iter(entry.values()))) == set(next(iter(other.values())))
                by_rank = [sorted(e.values(), key=lambda value: value["rank"] or 0)[:top_k] for e in (entry, other)]
                assert all(close(a["logprob"], b["logprob"]) for a, b in zip(*by_rank, strict=True))
                for token in entry.keys() & other.keys():
                    assert close(entry[token]["logprob"], other[token]["logprob"])
                    # Of a part of a character vLLM writes what it completes, if that, and no trainer reads either.
                    name = entry[token]["decoded_token"]
                    assert name == other[token]["decoded_token"] or "\ufffd" in name
                first, came = entry[str(prompt[position])], other[str(prompt[position])]
                assert abs(first["logprob"] - came["logprob"]) <= WITHIN, "in fp32"
                if top_k:
                    assert first["rank"] in (came["rank"], top_k + 1)
        assert {name: bodies[1]["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
            name: bodies[0]["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }


def test_echoed_logprobs_are_those_of_vllm(servers: tuple[str, str, str]) -> None:
    stock, ours, model = servers
    asked: dict[str, Any] = {"echo": True, "logprobs": 5, "return_tokens_as_token_ids": True, "temperature": 0}
    bodies = [ask(url, model, max_tokens=1, **asked) for url in (stock, ours)]
    for theirs, mine in zip(*(body["choices"] for body in bodies), strict=True):
        expected, got = theirs["logprobs"], mine["logprobs"]
        assert got["tokens"] == expected["tokens"] and got["text_offset"] == expected["text_offset"]
        assert set(got) == set(expected)
        assert got["token_logprobs"][0] is expected["token_logprobs"][0] is None
        for ours_, theirs_ in zip(got["token_logprobs"][1:], expected["token_logprobs"][1:], strict=True):
            assert close(ours_, theirs_)
        for ours_, theirs_ in zip(got["top_logprobs"][1:], expected["top_logprobs"][1:], strict=True):
            assert ours_.keys() == theirs_.keys() and all(close(ours_[token], theirs_[token]) for token in ours_)


def test_the_answer_to_token_ids_is_vllms(servers: tuple[str, str, str]) -> None:
    """Without the logprobs of given ids, which vLLM's runner for CPUs does not have."""
    stock, ours, model = servers
    for prompt in PROMPTS:
        params = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 1, "prompt_logprobs": 3, "logprobs": 2}
        payload = {"model": model, "token_ids": prompt, "sampling_params": params, "return_token_ids": True}
        answers = [httpx.post(f"{url}/inference/v1/generate", json=payload, timeout=120) for url in (stock, ours)]
        theirs, mine = (answer.raise_for_status().json() for answer in answers)
        assert set(mine) <= set(theirs), "no field is ours alone"
        assert mine["usage"].items() <= theirs["usage"].items()
        for name in ("output_mode", "prompt_token_ids", "prompt_token_id_logprobs"):
            assert mine[name] == theirs[name], name
        [choice], [expected] = mine["choices"], theirs["choices"]
        assert {name: choice[name] for name in choice if name != "logprobs"} == {
            name: expected[name] for name in choice if name != "logprobs"
        }
        [written], [truth] = choice["logprobs"]["content"], expected["logprobs"]["content"]
        assert set(written) == set(truth) and written["token_id"] == truth["token_id"]
        assert len(written["top_logprobs"]) == len(truth["top_logprobs"])
        for got, told in zip([written, *written["top_logprobs"]], [truth, *truth["top_logprobs"]], strict=True):
            assert got["rank"] == told["rank"] and close(got["logprob"], told["logprob"])
        assert len(mine["prompt_logprobs"]) == len(theirs["prompt_logprobs"]) == len(prompt)
        for token, entry, other in zip(
            prompt[1:], mine["prompt_logprobs"][1:], theirs["prompt_logprobs"][1:], strict=True
        ):
            assert next(iter(entry)) == next(iter(other)) == str(token) and len(entry) == len(other)
            assert abs(entry[str(token)]["logprob"] - other[str(token)]["logprob"]) <= WITHIN, "in fp32"
            for values in zip(*(sorted(v["logprob"] for v in e.values()) for e in (entry, other)), strict=True):
                assert close(*values)


def test_the_list_of_models_is_read_alike(servers: tuple[str, str, str]) -> None:
    theirs, ours = (httpx.get(f"{url}/v1/models").json() for url in servers[:2])
    assert ours["object"] == theirs["object"] and ours["data"][0]["max_model_len"] == theirs["data"][0]["max_model_len"]
    assert httpx.get(f"{servers[1]}/health").status_code == httpx.get(f"{servers[0]}/health").status_code == 200


def test_at_another_temperature_ours_is_right_and_vllms_is_that_of_1(
    servers: tuple[str, str, str], tiny_llama: Path
) -> None:
    stock, ours, model = servers
    asked: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": 8}
    theirs, mine = (ask(url, model, temperature=2.0, **asked)["choices"] for url in (stock, ours))
    plain = ask(stock, model, temperature=1.0, **asked)["choices"]
    logits = reference_logits(tiny_llama, [np.array(prompt) for prompt in PROMPTS])
    for choice, passed_over, at_1, logits_TV in zip(mine, theirs, plain, logits, strict=True):
        truth_TV = logits_TV / 2 - np.logaddexp.reduce(logits_TV / 2, axis=1)[:, None]
        for position, entry in enumerate(choice["prompt_logprobs"][1:], 1):
            for token, value in entry.items():
                assert value["logprob"] == pytest.approx(truth_TV[position - 1, int(token)], abs=4e-3, rel=4e-3)
            other, own = passed_over["prompt_logprobs"][position], at_1["prompt_logprobs"][position]
            assert all(abs(other[token]["logprob"] - own[token]["logprob"]) < WITHIN for token in other.keys() & own)
