"""The served teacher is the model: real vLLM behind the real service, asked over HTTP, held against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.requests import TargetsRequest
from tests.contract.engine_cases import (
    TEMPERATURES,
    assert_next,
    assert_temperatures,
    assert_top_k,
    reference_logits,
    sequences_of,
)
from tests.teacher_process import TeacherProcess


@pytest.mark.vllm
def test_vllm_over_http_is_a_float32_forward_pass_at_every_temperature(tiny_llama: Path) -> None:
    sequences = sequences_of([1, 2, 7, 300, 64, 511, 33], 512)
    truth = reference_logits(tiny_llama, sequences)
    options = (str(tiny_llama), "--engine", "vllm", "--dtype", "float32", "--max-num-batched-tokens", "128")
    with TeacherProcess(*options) as teacher, SyncTeacherClient(teacher.url) as client:
        request = TargetsRequest(sequences=tuple(sequences), top_k=64, temperatures=TEMPERATURES)
        answers = client.targets(request)
        for tokens_T, targets, logits_TV in zip(sequences, answers, truth, strict=True):
            assert_top_k(targets, logits_TV)
            assert_temperatures(targets.log_z, logits_TV)
            assert_next(targets, tokens_T, logits_TV)
            for index, temperature in enumerate(TEMPERATURES):
                shifted_TV = np.exp((logits_TV - logits_TV.max(axis=1, keepdims=True)) / temperature)
                softened_TV = shifted_TV / shifted_TV.sum(axis=1, keepdims=True)
                expected_TK = np.take_along_axis(softened_TV, targets.ids.astype(np.int64), axis=1)
                served_TK = targets.probabilities(index, temperature)
                # fp16 keeps a logprob to 2**-11 of itself.
                np.testing.assert_allclose(served_TK, expected_TK, rtol=5e-3, atol=0)
