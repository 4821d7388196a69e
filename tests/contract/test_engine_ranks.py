"""Real vLLM with a head on two ranks, on a CPU: they share its rows, and answer what transformers does."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from teacher_proto.requests import TargetSpec
from teacher_service.engines.vllm_engine import VllmEngine
from tests.contract.engine_cases import (
    assert_next,
    assert_temperatures,
    assert_top_k,
    job,
    reference_logits,
    sequences_of,
)
from tests.models import save_tiny_llama

SPEC = TargetSpec(kinds=("top_k", "score", "hidden"), top_k=64, temperatures=(1.0, 2.0, 5.0), hidden_dtype="float16")


@pytest.mark.vllm
@pytest.mark.slow
async def test_two_ranks_answer_what_one_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """500 ids, so that the second rank's columns end in padding; prompts in several steps, and odd numbers of rows."""
    model = save_tiny_llama(tmp_path / "model", num_key_value_heads=2, vocab_size=500)
    sequences = sequences_of([300, 1, 7, 200], 500)
    engine = VllmEngine(str(model), dtype="float32", tensor_parallel_size=2, max_num_batched_tokens=128)
    with caplog.at_level(logging.INFO, "stillhouse.vllm"):
        await engine.start()
    try:
        answers = await asyncio.gather(*(engine.score(job(tokens_T, SPEC)) for tokens_T in sequences))
        late = await engine.score(job(sequences[0], SPEC, (299, 300)))
    finally:
        await engine.close()
    assert "the ranks share the output head's rows: tp=2" in caplog.text and "hidden" in engine.kinds
    truth = reference_logits(model, sequences)
    for tokens_T, logits_TV, targets in zip(sequences, truth, answers, strict=True):
        assert_top_k(targets, logits_TV)
        assert_temperatures(targets.log_z, logits_TV)
        assert_next(targets, tokens_T, logits_TV)
    assert_top_k(late, truth[0][299:])
