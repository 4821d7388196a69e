"""Targets of an ensemble of teachers for one document: probabilities mixed by weight. Called by `mixed`.

With weights w_i that sum to one and p_i(v; T) teacher i's probability of token v at temperature T, the ensemble is

    P(v; T) = sum_i w_i p_i(v; T)

at every temperature: softened probabilities are mixed, which is not the same as softening the mixture. So logprobs at
T cannot be computed from those at 1, and a record holds both. From the union of the teachers' top-K ids and the
document's next token, each row keeps the K likeliest at T = 1.

Up to the teachers' rounding of logprobs to fp16, the document's next token and every id that all teachers list are
exact. An id that teacher i does not list lacks the summand w_i p_i(v; T), which is at most w_i times the smallest
probability that i lists in that row at T, and at most w_i times i's tail mass. What is lacking stays in the tail:
probabilities are never too high, and one minus their sum is the true tail mass plus all that is lacking, never
negative.

Draws are divided among the teachers by weight, rounded to whole draws. Logprobs at gathered ids are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from student_trainer.batch.batch_targets import TEMPERED
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets

LEAST = np.finfo(np.float32).tiny


@dataclass(frozen=True, eq=False)
class MixedTargets(TokenTargets):
    """Targets of an ensemble: ids [R, K] int32, logprobs [R, K] and next_logprob [R] fp32 at temperature 1.

    tempered_logprobs [R, K, T] fp32 are those at the requested temperatures. There is no lse and no log_z.
    """

    tempered_logprobs: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        tempered = {} if self.tempered_logprobs is None else {TEMPERED: self.tempered_logprobs}
        return super().tensors() | tempered


def mix(answers: Sequence[TokenTargets], weights: Sequence[float], query: Query) -> MixedTargets:
    """The ensemble's targets for one document, from its teachers' targets for the same rows."""
    start, num_rows, spec = answers[0].start, answers[0].num_rows, query.spec
    assert all((answer.start, answer.num_rows) == (start, num_rows) for answer in answers)
    tensors: dict[str, np.ndarray] = {}
    if {"top_k", "score"} & set(spec.kinds):
        logprobs = [answer.next_logprob for answer in answers]
        tensors["next_logprob"] = _log_mean([x for x in logprobs if x is not None], weights)
    if "top_k" in spec.kinds:
        next_R = np.append(query.tokens_T, -1)[start + 1 : start + num_rows + 1]
        tensors |= _mix_top_k(answers, weights, spec, next_R)
    if "gather" in spec.kinds:
        gathered = [answer.gather_logprobs for answer in answers]
        tensors["gather_logprobs"] = _log_mean([x for x in gathered if x is not None], weights)
    if "sampled" in spec.kinds:
        tensors |= _mix_draws(answers, num_rows)
    return MixedTargets(start, **tensors)


def share_draws(spec: TargetSpec, weights: Sequence[float]) -> list[TargetSpec]:
    """The spec for each teacher: the same except for its share of the draws and its seed.

    ValueError if there are too few draws for every teacher to have one.
    """
    if "sampled" not in spec.kinds:
        return [spec] * len(weights)
    quota = np.array(weights) * spec.num_samples
    counts = np.floor(quota).astype(int)
    # Largest remainders first, until all draws are assigned.
    for index in np.argsort(counts - quota, kind="stable")[: spec.num_samples - counts.sum()]:
        counts[index] += 1
    if not counts.all():
        raise ValueError(
            f"distillation.samples is {spec.num_samples}, too few for {len(weights)} weighted teachers: each must "
            f"draw at least once, but the one with the smallest weight gets a share of {min(weights):.3g}"
        )
    return [replace(spec, num_samples=int(count), seed=spec.seed + index) for index, count in enumerate(counts)]


def _mix_top_k(
    answers: Sequence[TokenTargets], weights: Sequence[float], spec: TargetSpec, next_R: np.ndarray
) -> dict[str, np.ndarray]:
    """The K likeliest ids of the union, and their logprobs at 1 and at each temperature.

    The candidates of a row are all ids that any teacher lists, teacher by teacher, followed by the next token.
    """
    columns, probabilities, exact = [], [], []
    for answer, weight in zip(answers, weights, strict=True):
        assert answer.ids is not None and answer.next_logprob is not None
        columns.append(answer.ids.astype(np.int64))
        probabilities.append(weight * _at_temperatures(answer, answer.logprobs, spec))
        exact.append(weight * _at_temperatures(answer, answer.next_logprob[:, None], spec))
    has_next_R1 = (next_R >= 0)[:, None]
    own_R1 = np.where(has_next_R1, next_R[:, None], columns[0][:, :1])
    ids_RC = np.concatenate([*columns, own_R1], 1)
    listed_RCS = np.concatenate(probabilities, 1)
    # Every teacher sends the next token's probability separately, so it is not counted again where it is listed.
    listed_RCS[(ids_RC[:, :-1] == own_R1) & has_next_R1] = 0.0
    own_R1S = np.where(has_next_R1[:, :, None], np.nan_to_num(sum(exact)), 0.0)
    ids_RK, mixed_RKS = _largest_sums(ids_RC, np.concatenate([listed_RCS, own_R1S], 1), spec.top_k)
    logprobs_RKS = np.log(np.maximum(mixed_RKS, LEAST)).astype(np.float32)
    return {
        "ids": ids_RK.astype(np.int32),
        "logprobs": np.ascontiguousarray(logprobs_RKS[:, :, 0]),
        TEMPERED: np.ascontiguousarray(logprobs_RKS[:, :, 1:]),
    }


def _at_temperatures(answer: TokenTargets, logprobs_RC: np.ndarray | None, spec: TargetSpec) -> np.ndarray:
    """Probabilities [R, C, 1 + T] at temperature 1 and at each requested temperature."""
    assert logprobs_RC is not None
    wide_RC = logprobs_RC.astype(np.float64)
    softened = [wide_RC]
    for index, temperature in enumerate(spec.temperatures):
        assert answer.log_z is not None
        # log p(T) = log p(1) / T - log_z, with log_z = lse(z / T) - lse(z) / T.
        softened.append(wide_RC / temperature - answer.log_z[:, index, None])
    return np.exp(np.stack(softened, -1))


def _largest_sums(ids_RC: np.ndarray, parts_RCS: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row, sum the parts of equal ids; return the `top_k` ids with the largest sums [., ., 0], largest first,
    and their sums.
    """
    rows, width = ids_RC.shape
    # Sorting puts equal ids side by side: a group begins wherever the id changes.
    order_RC = np.argsort(ids_RC, axis=1, kind="stable")
    sorted_RC = np.take_along_axis(ids_RC, order_RC, axis=1)
    first_RC = np.ones_like(sorted_RC, dtype=bool)
    first_RC[:, 1:] = sorted_RC[:, 1:] != sorted_RC[:, :-1]
    group_RC = np.cumsum(first_RC, axis=1) - 1
    # A flat index over all rows, so that one `np.add.at` sums the groups of every row.
    flat_RC = group_RC + np.arange(rows)[:, None] * width
    ids_RG = np.zeros((rows, width), dtype=np.int64)
    ids_RG.reshape(-1)[flat_RC[first_RC]] = sorted_RC[first_RC]
    sums_RGS = np.zeros_like(parts_RCS)
    sorted_RCS = np.take_along_axis(parts_RCS, order_RC[:, :, None], axis=1)
    np.add.at(sums_RGS.reshape(rows * width, -1), flat_RC.reshape(-1), sorted_RCS.reshape(rows * width, -1))
    # Unused slots sort last: actual sums are never negative.
    key_RG = np.where(np.arange(width) <= group_RC[:, -1:], sums_RGS[:, :, 0], -1.0)
    best_RK = np.argsort(-key_RG, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(ids_RG, best_RK, axis=1), np.take_along_axis(sums_RGS, best_RK[:, :, None], axis=1)


def _log_mean(logprobs: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """log sum_i w_i exp(logprob_i) as fp32; NaN where any of them is NaN."""
    # In log space throughout, so that small probabilities do not underflow.
    terms = [np.log(weight) + x.astype(np.float64) for x, weight in zip(logprobs, weights, strict=True)]
    with np.errstate(invalid="ignore"):
        return np.logaddexp.reduce(terms, axis=0).astype(np.float32)


def _mix_draws(answers: Sequence[TokenTargets], num_rows: int) -> dict[str, np.ndarray]:
    """The combined draws of all teachers: in each row every id once, ascending, with its count."""
    rows, ids, counts = [], [], []
    for answer in answers:
        assert (
            answer.sampled_offsets is not None and answer.sampled_ids is not None and answer.sampled_counts is not None
        )
        rows.append(np.repeat(np.arange(num_rows), np.diff(answer.sampled_offsets)))
        ids.append(answer.sampled_ids.astype(np.int64))
        counts.append(answer.sampled_counts.astype(np.int64))
    row_M, id_M, count_M = np.concatenate(rows), np.concatenate(ids), np.concatenate(counts)
    # Sorted unique (row, id) pairs; counts of the same id from several teachers are summed.
    pairs_U, inverse_M = np.unique(np.stack([row_M, id_M]), axis=1, return_inverse=True)
    summed_U = np.bincount(inverse_M.reshape(-1), weights=count_M, minlength=pairs_U.shape[1])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pairs_U[0], minlength=num_rows))])
    return {
        "sampled_offsets": offsets.astype(np.int32),
        "sampled_ids": pairs_U[1].astype(np.int32),
        "sampled_counts": summed_U.astype(np.uint16),
    }
