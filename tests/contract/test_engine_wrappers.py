"""Language models beside a vision tower, served as the language model alone and equal to transformers' own logits.

torchvision, which image processors need, is in no CPU installation: nothing here may ask for it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from transformers import AutoModelForImageTextToText

from teacher_proto.requests import TargetSpec
from teacher_service.engines.hf import HfEngine
from teacher_service.engines.vllm_engine import VllmEngine
from tests.contract.engine_cases import assert_next, assert_temperatures, assert_top_k, job, sequences_of
from tests.models import save_tiny_wrapper

# Each starts vLLM once; the two that are much like another are left to the slow tests.
FAMILIES = ("gemma3", "ministral3", "qwen3_vl",
            *(pytest.param(family, marks=pytest.mark.slow) for family in ("mistral3", "qwen2_5_vl")))  # fmt: skip
SPEC = TargetSpec(kinds=("top_k", "score", "hidden"), top_k=64, temperatures=(1.0, 2.0, 5.0), hidden_dtype="float16")


@pytest.fixture(scope="module", params=FAMILIES)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wrapper(tmp_path_factory.mktemp("wrappers") / request.param, request.param)


@pytest.mark.parametrize("engine", [HfEngine, pytest.param(VllmEngine, marks=pytest.mark.vllm)])
async def test_a_wrapper_s_language_model_is_served(wrapper: Path, engine: type[HfEngine] | type[VllmEngine]) -> None:
    sequences = sequences_of([60, 1, 200], 500)
    model = AutoModelForImageTextToText.from_pretrained(wrapper, dtype=torch.float32).eval()
    with torch.inference_mode():
        truth = [model(input_ids=torch.tensor(tokens_T)[None]).logits[0].double().numpy() for tokens_T in sequences]
    served = engine(str(wrapper), dtype="float32")
    await served.start()
    try:
        assert served.limits.vocab_size == 512 and served.limits.max_sequence_length == 512
        assert served.identity.semantic.vocab_size == 512 and served.identity.semantic.dtype == "float32"
        assert "hidden" in served.kinds
        answers = [await served.score(job(tokens_T, SPEC)) for tokens_T in sequences]
        file = served.head()
        head = load(file.read(0, file.size))
    finally:
        await served.close()
    for tokens_T, logits_TV, targets in zip(sequences, truth, answers, strict=True):
        assert_top_k(targets, logits_TV)
        assert_temperatures(targets.log_z, logits_TV)
        assert_next(targets, tokens_T, logits_TV)
        assert targets.hidden is not None
        product_TV = targets.hidden.astype(np.float64) @ head["weight"].T.astype(np.float64) * head["scale"]
        np.testing.assert_allclose(product_TV, logits_TV, atol=2e-3 * np.abs(logits_TV).max())
