"""A record that cannot be the answer is refused with its tensor and row; one that can be never is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from teacher_proto.errors import InvalidTargetsError
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import MASS_TOLERANCE, TokenTargets, check_targets
from tests.unit.proto.records import all_kinds, make_record, make_request

REQUEST = all_kinds()
RECORD = make_record(REQUEST)


def put(name: str, place: Any, value: float) -> Callable[[TokenTargets], TokenTargets]:
    def change(record: TokenTargets) -> TokenTargets:
        array = getattr(record, name).copy()
        array[place] = value
        return replace(record, **{name: array})

    return change


def to(name: str, work: Callable[[np.ndarray], Any]) -> Callable[[TokenTargets], TokenTargets]:
    return lambda record: replace(record, **{name: work(getattr(record, name))})


FAULTS: dict[str, tuple[Callable[[TokenTargets], TokenTargets], str]] = {
    "logprob NaN": (put("logprobs", (2, 1), np.nan), "logprobs are NaN or not largest first, first on row 2"),
    "first logprob NaN": (put("logprobs", (2, 0), np.nan), "logprobs: the largest is NaN or above 0, first on row 2"),
    "logprob positive": (put("logprobs", (1, 0), 0.5), "above 0, first on row 1"),
    "logprob infinite": (put("logprobs", (1, -1), -np.inf), "infinite, first on row 1"),
    "unsorted": (to("logprobs", lambda a: a[:, ::-1]), "not largest first, first on row 0"),
    "mass": (put("logprobs", 3, -0.1), "sum to more than 1, first on row 3"),
    "duplicate id": (lambda r: put("ids", (4, 1), r.ids[4, 0])(r), "ids: one is repeated, first on row 4"),
    "id at V": (put("ids", (0, 0), 300), "ids: got .* to 300, expected 0 to 299"),
    "wrong K": (to("ids", lambda a: a[:, :-1]), r"ids: got shape \[6, 4\], expected \[6, 5\]"),
    "missing row": (lambda r: r.narrow(0, 5), r"got rows \[0, 5\), expected \[0, 6\)"),
    "wrong start": (lambda r: replace(r, start=1), r"got rows \[1, 7\)"),
    "lse NaN": (put("lse", 5, np.nan), "lse: NaN or infinite, first on row 5"),
    "log_z infinite": (put("log_z", (1, 2), np.inf), "log_z: NaN or infinite, first on row 1"),
    "log_z of another temperature": (to("log_z", lambda a: a[:, ::-1]), "log_z: not a valid normaliser"),
    "log_z too small": (put("log_z", (3, 1), -8), "log_z: not a valid normaliser for temperature 2, first on row 3"),
    "next positive": (put("next_logprob", 2, 0.5), "next_logprob: NaN, infinite or above 0, first on row 2"),
    "next NaN inside": (put("next_logprob", 2, np.nan), "next_logprob: NaN, infinite or above 0, first on row 2"),
    "next not NaN at the end": (put("next_logprob", 5, -1.0), "next_logprob is a number on row 5"),
    "gathered NaN": (put("gather_logprobs", (0, 1), np.nan), "gather_logprobs: NaN, infinite or above 0"),
    "wrong G": (to("gather_logprobs", lambda a: a[:, 1:]), "gather_logprobs: got shape"),
    "offsets fall": (lambda r: put("sampled_offsets", 2, r.sampled_offsets[1])(r), "sampled_offsets do not rise"),
    "samples cut": (to("sampled_ids", lambda a: a[:-1]), "sampled_offsets do not rise"),
    "sample at V": (put("sampled_ids", -1, 300), "sampled_ids: got"),
    "sample twice": (lambda r: put("sampled_ids", 1, r.sampled_ids[0])(r), "do not ascend"),
    "draws missing": (lambda r: put("sampled_counts", 0, r.sampled_counts[0] + 1)(r), "does not have 9 draws"),
    "count of nought": (put("sampled_counts", 0, 0), "a count is below 1"),
    "scale NaN": (put("hidden_scale", 1, np.nan), "hidden_scale: NaN or infinite, first on row 1"),
    "scale missing": (lambda r: replace(r, hidden_scale=None), "got tensors"),
    "tensor missing": (lambda r: replace(r, lse=None), "got tensors"),
    "wrong dtype": (to("lse", lambda a: a.astype(np.float64)), "lse: got float64"),
    "other hidden": (lambda r: replace(r, hidden=r.hidden.astype(np.float16), hidden_scale=None), "got tensors"),
}  # fmt: skip


def test_the_record_is_good_before_it_is_spoilt() -> None:
    check_targets(RECORD, REQUEST.query(0), 300)


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_is_refused_with_tensor_and_row(name: str) -> None:
    spoil, message = FAULTS[name]
    with pytest.raises(InvalidTargetsError, match=message):
        check_targets(spoil(RECORD), REQUEST.query(0), 300)


def test_a_tensor_nobody_asked_for_is_refused() -> None:
    with pytest.raises(InvalidTargetsError, match="got tensors"):
        check_targets(RECORD, REQUEST.model_copy(update={"kinds": ("top_k",)}).query(0), 300)


def test_the_answer_for_other_tokens_is_noticed() -> None:
    request = make_request(lengths=(200, 200), top_k=20)
    check_targets(make_record(request, 0), request.query(0), 300)
    with pytest.raises(InvalidTargetsError, match="not the logprob of the sequence's next token"):
        check_targets(make_record(request, 1), request.query(0), 300)


def test_two_byte_ids_are_refused_where_the_vocabulary_needs_three() -> None:
    request = make_request(70_000)
    record = make_record(request, 0, 70_000)
    check_targets(record, request.query(0), 70_000)
    with pytest.raises(InvalidTargetsError, match="too narrow"):
        check_targets(replace(record, ids=record.ids.astype(np.uint16)), request.query(0), 70_000)


def test_rows_in_the_middle_have_their_next_logprob_and_the_last_has_none() -> None:
    request = make_request(lengths=(6,), rows=((2, 4),))
    check_targets(make_record(request), request.query(0), 300)
    last = make_request(lengths=(6,), rows=((5, 6),))
    check_targets(make_record(last), last.query(0), 300)


def test_slices_of_a_good_record_are_good() -> None:
    for start, stop in ((0, 6), (1, 4), (5, 6)):
        rows = ((start, stop), (0, 3))
        gather = tuple(g[a:b] for g, (a, b) in zip(REQUEST.gather_ids, rows, strict=True))
        request = REQUEST.model_copy(update={"rows": rows, "gather_ids": gather})
        check_targets(RECORD.narrow(start, stop), request.query(0), 300)


def flat(
    probabilities_RV: np.ndarray, top_k: int, temperatures: tuple[float, ...]
) -> tuple[TargetsRequest, TokenTargets]:
    """The record of explicit distributions, as an engine would round it."""
    logits_RV = np.log(probabilities_RV)
    order = np.argsort(-logits_RV, axis=1, kind="stable")[:, :top_k]
    rows, vocab_size = logits_RV.shape
    tokens_T = order[np.arange(rows) - 1, 0]
    next_R = np.append(logits_RV[np.arange(rows - 1), tokens_T[1:]], np.nan)
    log_z_RT = np.stack([np.logaddexp.reduce(logits_RV / t, axis=1) for t in temperatures], axis=1)
    record = TokenTargets(
        start=0, ids=order.astype(np.uint16 if vocab_size <= 65_536 else np.int32),
        logprobs=np.take_along_axis(logits_RV, order, axis=1).clip(-65_504, 0).astype(np.float16),
        lse=np.zeros(rows, np.float32), next_logprob=next_R.astype(np.float32), log_z=log_z_RT.astype(np.float32),
    )  # fmt: skip
    return TargetsRequest(sequences=(tokens_T,), top_k=top_k, temperatures=temperatures), record


@pytest.mark.parametrize("vocab_size", [2, 3, 64, 256, 1000, 3000, 9000])
def test_uniform_teachers_are_never_refused(vocab_size: int) -> None:
    """All K probabilities round the same way: the worst that fp16 does to a sum."""
    for top_k in {1, min(vocab_size, 256), vocab_size}:
        request, record = flat(np.full((4, vocab_size), 1 / vocab_size), top_k, (1.0, 0.001, 0.7, 5.0, 1000.0))
        check_targets(record, request.query(0), vocab_size)


def test_a_hundred_thousand_valid_rows_are_never_refused() -> None:
    rng = np.random.default_rng(0)
    for scale in np.geomspace(0.01, 60, 50):
        logits_RV = rng.normal(0, scale, (2000, 40))
        probabilities = np.exp(logits_RV - np.logaddexp.reduce(logits_RV, axis=1)[:, None])
        request, record = flat(probabilities.clip(1e-300), 20, (1.0, 0.5, 2.0, 5.0))
        check_targets(record, request.query(0), 40)


def test_the_tolerance_is_what_rounding_can_do_and_not_more() -> None:
    assert MASS_TOLERANCE <= 2.0**-8


def test_checks_stay_at_the_sizes_that_are_asked_for() -> None:
    query = REQUEST.query(0)
    assert (query.rows, query.spec.top_k, len(query.spec.temperatures)) == ((0, 6), 5, 3)
    check_targets(RECORD, query, 300)
    with pytest.raises(InvalidTargetsError, match="log_z: got shape"):
        check_targets(RECORD, replace(query, spec=replace(query.spec, temperatures=(1.0, 2.0))), 300)
