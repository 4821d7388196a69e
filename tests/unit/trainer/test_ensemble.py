"""The ensemble of several teachers against dense float64: what is exact, what is bounded, and which ids are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.supports import read_support, with_tail
from student_trainer.targets.ensemble import MixedTargets, mix, share_draws
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_service.engines.scripted_model import reduce_logits

V, T, K = 97, 40, 12
TEMPERATURES = (2.0, 5.0)
WEIGHTS = (0.7, 0.3)
ASK = TargetSpec(("top_k", "score", "gather", "sampled"), K, TEMPERATURES, num_samples=1000)


def dense(seed: int, sharpness: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, sharpness, (T, V))


def softened(logits_TV: np.ndarray, temperature: float) -> np.ndarray:
    p_TV = np.exp((logits_TV - logits_TV.max(1, keepdims=True)) / temperature)
    return p_TV / p_TV.sum(1, keepdims=True)


TOKENS = np.random.default_rng(9).integers(0, V, T)
GATHER = np.stack([np.random.default_rng(8).choice(V, 5, replace=False) for _ in range(T)])
# Alike enough to share many ids, and different enough that each lists some the other doesn't.
LOGITS = (dense(1, 2.0), dense(1, 2.0) + dense(2, 1.0))


def answer(logits_TV: np.ndarray, ask: TargetSpec, seed: int) -> TokenTargets:
    seeds = np.random.default_rng(seed).integers(0, 2**63, T).astype(np.uint64)
    tensors = reduce_logits(logits_TV, np.append(TOKENS, -1)[1:], ask, GATHER, seeds)
    sizes = tensors.pop("sampled_counts_R")
    return TokenTargets(0, sampled_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), **tensors)


@pytest.fixture(scope="module")
def mixed() -> MixedTargets:
    asks = share_draws(ASK, WEIGHTS)
    answers = [answer(logits, ask, seed) for seed, (logits, ask) in enumerate(zip(LOGITS, asks, strict=True))]
    return mix(answers, WEIGHTS, Query(TOKENS, (0, len(TOKENS)), ASK))


def truth(temperature: float) -> np.ndarray:
    return sum(w * softened(logits, temperature) for w, logits in zip(WEIGHTS, LOGITS, strict=True))


def listed(logits_TV: np.ndarray) -> np.ndarray:
    """Which ids [T, V] a teacher lists."""
    least_T1 = np.sort(logits_TV, 1)[:, -K, None]
    return logits_TV >= least_T1


@pytest.mark.parametrize("index", [0, 1, 2])
def test_probabilities_at_every_temperature_are_exact_or_short_by_no_more_than_is_said(
    mixed: MixedTargets, index: int
) -> None:
    temperature = (1.0, *TEMPERATURES)[index]
    logprobs_TK = mixed.logprobs if index == 0 else mixed.tempered_logprobs[:, :, index - 1]
    true_TK = np.take_along_axis(truth(temperature), mixed.ids, 1)
    short_TK = true_TK - np.exp(logprobs_TK.astype(np.float64))
    rounding_TK = 4e-3 * true_TK
    assert (short_TK > -rounding_TK).all(), "a probability is above the truth"
    allowed_TV = np.zeros((T, V))
    for weight, logits_TV in zip(WEIGHTS, LOGITS, strict=True):
        p_TV, lists_TV = softened(logits_TV, temperature), listed(logits_TV)
        least_T1 = np.where(lists_TV, p_TV, np.inf).min(1, keepdims=True)
        tail_T1 = np.where(lists_TV, 0, p_TV).sum(1, keepdims=True)
        allowed_TV += weight * np.where(lists_TV, 0.0, np.minimum(least_T1, tail_T1))
    own_T = np.append(TOKENS, -1)[1:]
    allowed_TV[np.arange(T - 1), own_T[:-1]] = 0.0
    allowed_TK = np.take_along_axis(allowed_TV, mixed.ids, 1)
    assert (short_TK <= allowed_TK + rounding_TK).all()
    assert (allowed_TK == 0).mean() > 0.5 and (allowed_TK > 0).any(), "the case tests both"


def test_the_next_token_is_exact_and_the_kept_ids_are_the_likeliest(mixed: MixedTargets) -> None:
    p_TV = truth(1.0)
    np.testing.assert_allclose(np.exp(mixed.next_logprob[:-1]), p_TV[np.arange(T - 1), TOKENS[1:]], rtol=1e-5)
    assert np.isnan(mixed.next_logprob[-1])
    assert all(len(set(row)) == K for row in mixed.ids.tolist())
    assert (np.diff(mixed.logprobs, axis=1) <= 0).all()
    # By what is known of them: no id that both teachers list is left out for a less likely one.
    both_TV = listed(LOGITS[0]) & listed(LOGITS[1])
    kept_TV = np.zeros((T, V), bool)
    np.put_along_axis(kept_TV, mixed.ids, True, 1)
    best_left_T = np.where(both_TV & ~kept_TV, p_TV, 0).max(1)
    assert (best_left_T <= np.exp(mixed.logprobs[:, -1]) * 1.005).all()


def test_gathered_logprobs_are_exact_and_draws_are_shared_out_by_weight(mixed: MixedTargets) -> None:
    expected_TG = np.log(np.take_along_axis(truth(1.0), GATHER, 1))
    np.testing.assert_allclose(mixed.gather_logprobs, expected_TG, rtol=2e-3, atol=2e-3)
    sums = np.add.reduceat(mixed.sampled_counts.astype(int), mixed.sampled_offsets[:-1])
    assert (sums == 1000).all()
    assert [ask.num_samples for ask in share_draws(ASK, WEIGHTS)] == [700, 300]
    for row in range(T):
        ids = mixed.sampled_ids[mixed.sampled_offsets[row] : mixed.sampled_offsets[row + 1]]
        assert (np.diff(ids) > 0).all()
    counted_TV = np.zeros((T, V))
    rows = np.repeat(np.arange(T), np.diff(mixed.sampled_offsets))
    counted_TV[rows, mixed.sampled_ids] = mixed.sampled_counts / 1000
    # 40 rows of 1,000 draws: a standard error of sqrt(p / 40,000) on the mean over rows.
    error_V = np.abs((counted_TV - truth(1.0)).mean(0))
    assert (error_V < 5 * np.sqrt(truth(1.0).mean(0) / (T * 1000)) + 1e-3).all()


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
def test_losses_read_a_distribution_whose_tail_holds_all_that_is_short(mixed: MixedTargets, temperature: float) -> None:
    rows = TeacherRows(
        ids_NK=torch.tensor(mixed.ids), logprobs_NK=torch.tensor(mixed.logprobs), temperatures=TEMPERATURES,
        tempered_logprobs_NKT=torch.tensor(mixed.tempered_logprobs),
    )  # fmt: skip
    support = read_support(rows, "top_k", temperature, V, torch.ones(T, dtype=torch.bool))
    q_TK1 = with_tail(support, V).exp().double().numpy()
    np.testing.assert_allclose(q_TK1.sum(1), 1.0, atol=1e-5)
    kept_T = np.take_along_axis(truth(temperature), mixed.ids, 1).sum(1)
    assert (q_TK1[:, -1] >= 1 - kept_T - 3e-3).all()


def test_two_times_the_same_teacher_is_that_teacher() -> None:
    ask = TargetSpec(("top_k",), K, TEMPERATURES)
    single = answer(LOGITS[0], ASK, 0)
    twice = mix([single, single], (0.5, 0.5), Query(TOKENS, (0, len(TOKENS)), ask))
    np.testing.assert_allclose(twice.logprobs, single.logprobs, atol=4e-3)
    # The row's own next token is known in fp32, so it may change places with one that fp16 makes its equal.
    assert (twice.ids == single.ids).mean() > 0.99


def test_too_few_draws_for_all_are_refused() -> None:
    with pytest.raises(ValueError, match=r"distillation\.samples is 2"):
        share_draws(TargetSpec(("sampled",), num_samples=2), (0.9, 0.05, 0.05))
