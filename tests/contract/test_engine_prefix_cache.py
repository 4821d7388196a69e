"""Real vLLM where rows begin behind a shared prefix: the cache is read, and every answer is as if it were not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_service.engines.vllm_engine import VllmEngine
from tests.contract.engine_cases import assert_next, assert_top_k, job, reference_logits, sequences_of

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]
SPEC = TargetSpec(kinds=("top_k", "score"), top_k=32, temperatures=(2.0,))
BLOCK, PROMPT, LENGTH = 32, 300, 400


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_llama: Path) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(str(tiny_llama), max_num_batched_tokens=128, vllm_args={"block_size": BLOCK})
    await engine.start()
    yield engine
    await engine.close()


def assert_same(ours: TokenTargets, expected: TokenTargets) -> None:
    assert ours.start == expected.start and ours.tensors().keys() == expected.tensors().keys()
    for name, array in ours.tensors().items():
        within = 0 if name == "ids" else 2e-3
        np.testing.assert_allclose(array, expected.tensors()[name], rtol=0, atol=within, err_msg=name)


async def test_completions_of_one_prompt_are_scored_and_the_prompt_is_computed_once(
    engine: VllmEngine, tiny_llama: Path
) -> None:
    (prompt,) = sequences_of([PROMPT], 512, seed=1)
    rollouts = [np.concatenate([prompt, tail]) for tail in sequences_of([LENGTH - PROMPT] * 5, 512, seed=2)]
    rows = (PROMPT - 1, LENGTH)
    before = engine.tokens_computed
    first = await engine.score(job(rollouts[0], SPEC, rows))
    assert engine.tokens_computed - before == LENGTH
    others = await asyncio.gather(*(engine.score(job(tokens_T, SPEC, rows)) for tokens_T in rollouts[1:]))
    cached = PROMPT // BLOCK * BLOCK
    assert engine.tokens_computed - before == LENGTH + 4 * (LENGTH - cached)
    for tokens_T, logits_TV, targets in zip(
        rollouts, reference_logits(tiny_llama, rollouts), [first, *others], strict=True
    ):
        assert_top_k(targets, logits_TV[slice(*rows)])
        assert_next(targets, tokens_T, logits_TV)


async def test_rows_that_the_cache_holds_are_computed_all_the_same(engine: VllmEngine) -> None:
    """The whole sequence is in the cache, by much more than lies before the first row: it is asked a second time."""
    (tokens_T,) = sequences_of([LENGTH], 512, seed=3)
    whole = await engine.score(job(tokens_T, SPEC))
    for start in (1, BLOCK, 200, LENGTH - BLOCK - 1, LENGTH - 1):
        assert_same(await engine.score(job(tokens_T, SPEC, (start, LENGTH))), whole.narrow(start, LENGTH))
        assert_same(await engine.score(job(tokens_T, SPEC, (start, start + 1))), whole.narrow(start, start + 1))


async def test_rows_from_the_first_on_and_fresh_ones_never_read_it(engine: VllmEngine) -> None:
    (tokens_T,) = sequences_of([LENGTH], 512, seed=4)
    await engine.score(job(tokens_T, SPEC))
    late = job(tokens_T, SPEC, (LENGTH - 1, LENGTH))
    for asked in (job(tokens_T, SPEC), replace(late, fresh=True)):
        before = engine.tokens_computed
        await engine.score(asked)
        assert engine.tokens_computed - before == LENGTH
    before = engine.tokens_computed
    await engine.score(late)
    assert engine.tokens_computed - before == LENGTH - (LENGTH - 1) // BLOCK * BLOCK


async def test_many_at_once_with_little_memory_are_preempted_and_right(tiny_llama: Path) -> None:
    """A cache of three sequences for eight at a time: some lose their blocks, and find part of them again."""
    tight = VllmEngine(
        str(tiny_llama), max_num_batched_tokens=64, max_num_seqs=8, kv_cache_bytes=3 * 512 * 2 * 2 * 32 * 4,
        vllm_args={"block_size": BLOCK},
    )  # fmt: skip
    await tight.start()
    try:
        (prompt,) = sequences_of([200], 512, seed=5)
        rollouts = [np.concatenate([prompt, tail]) for tail in sequences_of([250] * 12, 512, seed=6)]
        starts = [199, 10, 300, 449] * 3
        answers = await asyncio.gather(
            *(tight.score(job(t, SPEC, (start, 450))) for t, start in zip(rollouts, starts, strict=True))
        )
    finally:
        await tight.close()
    for tokens_T, start, logits_TV, targets in zip(
        rollouts, starts, reference_logits(tiny_llama, rollouts), answers, strict=True
    ):
        assert_top_k(targets, logits_TV[start:450])
        assert_next(targets, tokens_T, logits_TV)
