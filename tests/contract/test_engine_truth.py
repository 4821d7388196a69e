"""Every kind of target, from real engines, against a float32 transformers forward pass of the same weights."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets, check_targets
from teacher_service.engines.protocol import Engine
from tests.contract.engine_cases import (
    TEMPERATURES,
    assert_next,
    assert_temperatures,
    assert_top_k,
    chi_square_p,
    job,
    log_softmax,
    logsumexp,
    reference_logits,
    sequences_of,
    widen,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")
LENGTHS = (1, 2, 5, 17, 300, 64, 65, 511, 500, 480, 3, 512)
TOP_K = TargetSpec(kinds=("top_k", "score"), top_k=64, temperatures=TEMPERATURES)
SCORE = TargetSpec(kinds=("score",))


@pytest.fixture(params=["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(f"{request.param}_engine")


async def score_all(engine: Engine, jobs: list[Any]) -> list[TokenTargets]:
    return await asyncio.gather(*(engine.score(one) for one in jobs))


async def test_top_k_score_and_temperatures_are_the_model_s(engine: Engine, tiny_llama: Path) -> None:
    sequences = sequences_of(LENGTHS, 512)
    answers = await score_all(engine, [job(tokens_T, TOP_K) for tokens_T in sequences])
    for tokens_T, logits_TV, targets in zip(sequences, reference_logits(tiny_llama, sequences), answers, strict=True):
        assert_top_k(targets, logits_TV)
        assert_temperatures(targets.log_z, logits_TV)
        assert_next(targets, tokens_T, logits_TV)
        check_targets(targets, Query(tokens_T, (0, len(tokens_T)), TOP_K), 512)


async def test_exact_probabilities_at_every_temperature(engine: Engine, tiny_llama: Path) -> None:
    [tokens_T] = sequences_of([40], 512, seed=1)
    targets = await engine.score(job(tokens_T, TOP_K))
    [logits_TV] = reference_logits(tiny_llama, [tokens_T])
    assert targets.ids is not None
    for i, temperature in enumerate(TEMPERATURES):
        truth = np.take_along_axis(np.exp(log_softmax(logits_TV / temperature)), targets.ids.astype(int), axis=1)
        np.testing.assert_allclose(targets.probabilities(i, temperature), truth, rtol=4e-3 / temperature)


async def test_score_alone_is_four_bytes_a_token(engine: Engine, tiny_llama: Path) -> None:
    [tokens_T] = sequences_of([33], 512, seed=2)
    targets = await engine.score(job(tokens_T, TargetSpec(kinds=("score",))))
    assert list(targets.tensors()) == ["next_logprob"] and targets.nbytes == 4 * 33
    assert_next(targets, tokens_T, reference_logits(tiny_llama, [tokens_T])[0])


async def test_rows_are_the_slice_of_the_whole(engine: Engine) -> None:
    [tokens_T] = sequences_of([300], 512, seed=3)
    cuts = [(0, 1), (0, 64), (63, 130), (299, 300), (100, 300)]
    gather_TG = np.random.default_rng(0).integers(0, 512, (300, 7))
    spec = TargetSpec(kinds=("top_k", "score", "gather", "sampled", "hidden"), top_k=8, temperatures=(2.0,),
                      num_samples=20, seed=5, hidden_dtype="float16")  # fmt: skip
    whole = await engine.score(job(tokens_T, spec, ids_RG=gather_TG))
    parts = await score_all(engine, [job(tokens_T, spec, cut, ids_RG=gather_TG[slice(*cut)]) for cut in cuts])
    for cut, part in zip(cuts, parts, strict=True):
        expected = whole.narrow(*cut).tensors()
        assert part.start == cut[0] and set(part.tensors()) == set(expected)
        for name, array in part.tensors().items():
            exact = name.startswith("sampled") or name == "ids"
            np.testing.assert_allclose(array, expected[name], atol=0 if exact else 2e-3, rtol=0, err_msg=name)


async def test_largest_k_is_the_whole_vocabulary_in_order(engine: Engine, tiny_llama: Path) -> None:
    [tokens_T] = sequences_of([9], 512, seed=4)
    targets = await engine.score(job(tokens_T, TargetSpec(kinds=("top_k",), top_k=512)))
    assert_top_k(targets, reference_logits(tiny_llama, [tokens_T])[0])
    assert targets.ids is not None and (np.sort(targets.ids, axis=1) == np.arange(512)).all()


async def test_gather_answers_the_ids_of_each_row(engine: Engine, tiny_llama: Path) -> None:
    sequences = sequences_of([50, 7, 200], 512, seed=5)
    ids = [np.random.default_rng(i).integers(0, 512, (len(s), 5 + i)) for i, s in enumerate(sequences)]
    spec = TargetSpec(kinds=("gather",), temperatures=TEMPERATURES)
    answers = await score_all(engine, [job(s, spec, ids_RG=g) for s, g in zip(sequences, ids, strict=True)])
    for logits_TV, ids_RG, targets in zip(reference_logits(tiny_llama, sequences), ids, answers, strict=True):
        truth = np.take_along_axis(log_softmax(logits_TV), ids_RG, axis=1)
        assert targets.gather_logprobs is not None and targets.lse is not None
        np.testing.assert_allclose(targets.gather_logprobs, truth, rtol=2**-11, atol=1e-3)
        assert_temperatures(targets.log_z, logits_TV)


async def test_samples_follow_the_distribution_at_their_temperature(engine: Engine, tiny_llama: Path) -> None:
    """Chi-square over 4096 draws a row; the smallest of 48 p-values must not be below what chance gives."""
    [tokens_T] = sequences_of([16], 512, seed=6)
    [logits_TV] = reference_logits(tiny_llama, [tokens_T])
    worst = 1.0
    for temperature in TEMPERATURES:
        spec = TargetSpec(kinds=("sampled",), num_samples=4096, sample_temperature=temperature, seed=11)
        targets = await engine.score(job(tokens_T, spec))
        expected_TV = 4096 * np.exp(log_softmax(logits_TV / temperature))
        for counts_V, expected_V in zip(counts_of(targets, 512), expected_TV, strict=True):
            keep = expected_V >= 8  # the rest in one cell
            observed = np.append(counts_V[keep], counts_V[~keep].sum() + 1e-9)
            worst = min(worst, chi_square_p(observed, np.append(expected_V[keep], expected_V[~keep].sum() + 1e-9)))
    assert worst > 1e-5


async def test_sampled_gradient_is_right_in_expectation(engine: Engine, tiny_llama: Path) -> None:
    """The gradient of cross-entropy on counts / n is q - counts / n: over rows and seeds it tends to q - p."""
    [tokens_T] = sequences_of([64], 512, seed=7)
    [logits_TV] = reference_logits(tiny_llama, [tokens_T])
    probability_TV = np.exp(log_softmax(logits_TV))
    specs = [TargetSpec(kinds=("sampled",), num_samples=50, seed=seed) for seed in range(64)]
    answers = await score_all(engine, [job(tokens_T, spec) for spec in specs])
    mean_TV = np.mean([counts_of(targets, 512) / 50 for targets in answers], axis=0)
    z_TV = (mean_TV - probability_TV) / np.sqrt(probability_TV * (1 - probability_TV) / (50 * 64) + 1e-12)
    likely = probability_TV > 1e-3
    assert abs(z_TV[likely].mean()) < 0.05 and 0.9 < z_TV[likely].std() < 1.1


async def test_samples_depend_on_seed_and_tokens_and_not_on_the_batch(engine: Engine) -> None:
    sequences = sequences_of([70, 71, 300, 20], 512, seed=8)
    spec = TargetSpec(kinds=("sampled",), num_samples=30, seed=3)
    together = await score_all(engine, [job(tokens_T, spec) for tokens_T in sequences])
    for tokens_T, targets in zip(sequences, together, strict=True):
        alone = await engine.score(job(tokens_T, spec))
        for name, array in alone.tensors().items():
            if name != "lse":
                np.testing.assert_array_equal(array, getattr(targets, name))
    reseeded = await engine.score(job(sequences[0], TargetSpec(kinds=("sampled",), num_samples=30, seed=4)))
    assert not np.array_equal(counts_of(reseeded, 512), counts_of(together[0], 512))


@pytest.mark.parametrize(("dtype", "within"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 5e-2)])
async def test_hidden_states_and_the_head_give_the_full_distribution(
    engine: Engine, tiny_llama: Path, tmp_path: Path, dtype: Any, within: float
) -> None:
    """KL over the whole vocabulary at T = 5 against a uniform student, from what the client can have."""
    [tokens_T] = sequences_of([120], 512, seed=9)
    targets = await engine.score(job(tokens_T, TargetSpec(kinds=("hidden",), hidden_dtype=dtype)))
    file = engine.head()
    head = load(file.read(0, file.size))
    assert targets.hidden is not None
    logits_TV = widen(targets.hidden, dtype, targets.hidden_scale) @ head["weight"].T.astype(np.float64) * head["scale"]
    [truth_TV] = reference_logits(tiny_llama, [tokens_T])
    np.testing.assert_allclose(logits_TV, truth_TV, atol=within * np.abs(truth_TV).max())
    np.testing.assert_allclose(kl_to_uniform(logits_TV / 5), kl_to_uniform(truth_TV / 5), atol=within)
    np.testing.assert_allclose(targets.lse, logsumexp(truth_TV), atol=1e-4)


async def test_cancelling_leaves_the_engine_to_others(engine: Engine) -> None:
    sequences = sequences_of([512] * 12, 512, seed=10)
    tasks = [asyncio.create_task(engine.score(job(tokens_T, TOP_K))) for tokens_T in sequences]
    await asyncio.sleep(0.01)
    for task in tasks[1:]:
        task.cancel()
    first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, TokenTargets) and first.num_rows == 512
    assert all(isinstance(other, asyncio.CancelledError) for other in others)
    await engine.check()
    assert (await engine.score(job(sequences[0][:5], TOP_K))).num_rows == 5


async def test_an_urgent_job_is_computed_before_those_that_wait(engine: Engine) -> None:
    before = engine.tokens_computed
    waiting = [asyncio.create_task(engine.score(job(tokens_T, SCORE))) for tokens_T in sequences_of([500] * 40, 512)]
    await asyncio.sleep(0)
    (tokens_T,) = sequences_of([16], 512)
    await engine.score(replace(job(tokens_T, SCORE), urgent=True))
    done = sum(task.done() for task in waiting)
    await asyncio.gather(*waiting)
    assert done < 20
    assert engine.tokens_computed - before == 40 * 500 + 16


async def test_identity_and_limits_are_those_of_the_folder(engine: Engine, tiny_llama: Path) -> None:
    semantic = engine.identity.semantic
    assert (semantic.model, semantic.revision, semantic.dtype) == ("tiny-llama", "local", "float32")
    assert set(semantic.weights) == {"model.safetensors"} and semantic.vocab_size == 512
    assert engine.limits.vocab_size == 512 and engine.limits.max_sequence_length == 512
    assert engine.kinds == ("top_k", "score", "gather", "sampled", "hidden")


def counts_of(targets: TokenTargets, vocab_size: int) -> np.ndarray:
    """Draws [R, V] by id."""
    offsets, ids, counts = targets.sampled_offsets, targets.sampled_ids, targets.sampled_counts
    assert offsets is not None and ids is not None and counts is not None
    counts_RV = np.zeros((targets.num_rows, vocab_size))
    counts_RV[np.repeat(np.arange(targets.num_rows), np.diff(offsets)), ids] = counts
    return counts_RV


def kl_to_uniform(logits_TV: np.ndarray) -> np.ndarray:
    logprob_TV = log_softmax(logits_TV)
    return (np.exp(logprob_TV) * (logprob_TV + np.log(logits_TV.shape[1]))).sum(axis=1)
