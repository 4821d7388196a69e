"""Other people's own code against our routes, out of their wheels, which are installed without what they depend on:
axolotl's online collator and lm-eval's local-completions. TRL's is in `test_compat_trl`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.faces import VOCAB, came_of, truth_of
from tests.models import tiny_tokenizer
from tests.teacher_process import TeacherProcess
from tests.trainer_run import teacher_script

TOP_K = 8
RNG = np.random.default_rng(5)
SEQUENCES = [RNG.integers(0, VOCAB, length).tolist() for length in (12, 3, 30)]
LABELS = [[-100, -100, *tokens[2:]] for tokens in SEQUENCES]


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess(script=teacher_script()) as process:
        yield process


@pytest.fixture(scope="module")
def collator_class() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
        from axolotl.integrations.kd.collator_online_teacher import OnlineTeacherCollator

    return OnlineTeacherCollator


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_axolotls_online_collator(
    teacher: TeacherProcess, collator_class: Any, server: str, temperature: float
) -> None:
    collator = collator_class(
        tiny_tokenizer(), kd_online_server_base_url=teacher.url, kd_online_topk=TOP_K, kd_temperature=temperature,
        kd_online_server=server, kd_normalize_topk=False,
    )  # fmt: skip
    fetch = getattr(collator, f"fetch_online_logprobs_{server}")
    answer = fetch(SEQUENCES, LABELS)
    assert [len(answer[name]) for name in ("target_token_ids", "target_logprobs", "target_mask")] == [3, 3, 3]
    for tokens, labels, ids, logprobs, mask in zip(
        SEQUENCES, LABELS, answer["target_token_ids"], answer["target_logprobs"], answer["target_mask"], strict=True
    ):
        assert len(ids) == len(logprobs) == len(mask) == len(tokens)
        # Of vLLM it puts the row of token t + 1 at t, and padding last; of SGLang that of token t, and padding first.
        rows = slice(0, -1) if server == "vllm" else slice(1, None)
        assert [row[0] for row in mask][rows] == [int(label != -100) for label in labels[1:]]
        truth_RV = truth_of(tokens, temperature)[:-1]
        for row_V, came, ids_K, logprobs_K in zip(truth_RV, tokens[1:], ids[rows], logprobs[rows], strict=True):
            best = np.argsort(-row_V, kind="stable")[:TOP_K].tolist()
            # vLLM writes the token that came first.
            expected = best if server == "sglang" else [came, *(token for token in best if token != came)][:TOP_K]
            assert ids_K == expected
            np.testing.assert_allclose(logprobs_K, row_V[ids_K], rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("concurrent", [1, 3])
def test_lm_evals_local_completions(teacher: TeacherProcess, tmp_path: Path, concurrent: int) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = LocalCompletionsAPI(
        base_url=f"{teacher.url}/v1/completions", model=teacher.model, tokenizer=str(tmp_path),
        tokenizer_backend="huggingface", num_concurrent=concurrent, max_retries=1,
    )  # fmt: skip
    texts = [("The still", " takes a wash"), ("def run(self,", " x): return"), ("a", "b")]
    greedy_ids = tokenizer("The spirit").input_ids
    likeliest = tokenizer.decode([int(truth_of(greedy_ids)[-1][: len(tokenizer)].argmax())])
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
        for number, pair in enumerate([*texts, ("The spirit", likeliest)])
    ]
    for request, (total, is_greedy) in zip(requests, model.loglikelihood(requests, disable_tqdm=True), strict=True):
        context, continuation = (tokenizer(text).input_ids for text in (request.args[0], "".join(request.args)))
        assert continuation[: len(context)] == context, "a pair that the tokenizer merges says nothing here"
        expected = came_of(continuation)[len(context) - 1 :]
        assert math.isclose(total, expected.sum(), abs_tol=1e-3)
        best_R = truth_of(continuation)[len(context) - 1 : -1].argmax(axis=1)
        assert is_greedy == bool((best_R == continuation[len(context) :]).all())
