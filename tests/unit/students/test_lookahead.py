"""Looking ahead: the reference's leave-one-out figures through the scoring API, who is a candidate, and whole runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer import loop
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.view import ViewSeed
from student_trainer.losses import head_loss, token_term
from student_trainer.losses.supports import read_support
from student_trainer.settings.distillation import LookaheadSettings
from student_trainer.students.diffusion_record import DiffusionRecord
from student_trainer.targets.background import EventThread
from student_trainer.targets.lookahead import Lookahead, candidates
from student_trainer.targets.prefetch import Ready
from student_trainer.targets.protocol import Queries
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, run_here, trace_of
from tests.unit.students.test_tcs import CAUSAL, STUDENT, TEXT, VOCABULARY, MaskedAt

LEAVE_ONE_OUT = {
    1: (0.230845, 0.653633, 0.032240, 0.082561, 0.000722),
    2: (0.125272, 0.013354, 0.061906, 0.033880, 0.765588),
    3: CAUSAL[3],
}
TO_CAUSAL = {1: 0.605992, 2: 0.219965, 3: 0.0}
TO_ONE_TOKEN = {1: 0.236204, 2: 0.0, 3: 0.0}


def log_p(text: Any) -> np.ndarray:
    """[T, V]: the reference's teacher, its logprobs of each token by the two before it."""
    before, v = (0, 0, *text), np.arange(VOCABULARY)
    z_TV = np.array([((2 * u1 + 3 * u2 + v * (u1 + 2) + v * v) % 7) / 2 + v / 10 for u2, u1 in pairwise(before)])
    return z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True))


class Reference:
    """That teacher as a source of scores, with a note of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], tuple[int, int]]] = []

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        answers = []
        for query in queries:
            assert query is not None and query.spec == TargetSpec(("score",))
            tokens = query.tokens_T.tolist()
            self.asked.append((tokens, query.rows))
            rows = np.arange(*query.rows)
            scores_R = np.array([log_p(tokens)[row + 1, tokens[row + 1]] for row in rows], np.float32)
            answers.append(TokenTargets(start=query.rows[0], next_logprob=scores_R))
        return BatchTargets(tuple(answers), TargetSpec(("score",)), "")


def ready(k: int, temperature: float | None = None, text: Any = TEXT) -> Ready:
    batch = build_batch(0, [[Placed(0, "x", np.array(text, np.int32), None)]], 4, 0, ("x",))
    z_RV = torch.from_numpy(log_p(text))[1:]
    top = z_RV.topk(k)
    log_z_R1 = None if temperature is None else (z_RV / temperature).logsumexp(-1)[:, None].numpy().astype(np.float32)
    answer = TokenTargets(
        start=0, ids=top.indices.numpy().astype(np.int32), logprobs=top.values.numpy().astype(np.float16),
        log_z=log_z_R1,
    )  # fmt: skip
    spec = TargetSpec(("top_k",), k, () if temperature is None else (temperature,))
    targets = BatchTargets((answer,), spec, "")
    reader = MaskedAt(DiffusionRecord(4, 0, "in_place", "block_causal"))
    micro = cut(batch, targets, reader, ViewSeed(5))  # the first view masks 1 and 3, the second 2
    return Ready(batch, None, targets, tuple(micro))  # type: ignore[arg-type]


def looked(what: Ready, teacher: Reference, **settings: Any) -> Ready:
    wanted = LookaheadSettings(**{"window": 3, "candidates": 5, "positions": None, "student_best": False} | settings)
    with EventThread() as thread:
        return Lookahead(teacher, thread, wanted, 0).add(None, what, lambda _: None)  # type: ignore[arg-type]


def by_token(what: Ready) -> dict[int, np.ndarray]:
    """The whole distribution of each masked token, by the teacher's rows."""
    found = {}
    for micro in what.micro:
        assert micro.teacher is not None and micro.teacher.ids_NK is not None and micro.teacher.logprobs_NK is not None
        for label, ids, logprobs in zip(
            micro.view.counted_N + 1, micro.teacher.ids_NK, micro.teacher.logprobs_NK, strict=True
        ):
            p_V = np.zeros(VOCABULARY)
            np.add.at(p_V, ids.numpy(), logprobs.double().exp().numpy())
            found[int(label)] = p_V
    return found


def kl(p_V: Any, q_V: Any) -> float:
    p_V, q_V = np.asarray(p_V), np.asarray(q_V)
    return float((p_V * np.log(p_V / q_V)).sum())


def test_with_every_candidate_and_the_whole_rest_it_is_the_leave_one_out_distribution() -> None:
    """And with a window of one token, what the reference has for that; against sums over all texts, too."""
    whole, one = (by_token(looked(ready(5), Reference(), window=window)) for window in (3, 1))
    for token, expected in LEAVE_ONE_OUT.items():
        assert whole[token] == pytest.approx(expected, abs=2e-6)
        weights = [np.exp(_logprob((*TEXT[:token], v, *TEXT[token + 1 :]))) for v in range(VOCABULARY)]
        assert whole[token] == pytest.approx(np.array(weights) / sum(weights), abs=1e-6)
        assert kl(whole[token], CAUSAL[token]) == pytest.approx(TO_CAUSAL[token], abs=1e-5)
        assert kl(whole[token], one[token]) == pytest.approx(TO_ONE_TOKEN[token], abs=1e-5)


def _logprob(text: Any) -> float:
    return float(sum(row[token] for row, token in zip(log_p(text)[: len(text)], text, strict=True)))


def test_what_the_causal_target_misses_is_the_information_in_what_follows() -> None:
    """E KL(loo || causal) over all the teacher's texts of four tokens: the reference's last column."""
    texts = list(product(range(VOCABULARY), repeat=4))
    p = np.exp([_logprob(text) for text in texts])
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    sums = dict.fromkeys((1, 2, 3), 0.0)
    table = dict(zip(texts, p, strict=True))
    for text, weight in table.items():
        for token in sums:
            loo = np.array([table[(*text[:token], v, *text[token + 1 :])] for v in range(VOCABULARY)])
            sums[token] += weight * kl(loo / loo.sum(), np.exp(log_p(text)[token]))
    assert list(sums.values()) == pytest.approx([0.394039, 0.232617, 0.0], abs=2e-6)


GAPS = {(1, 2): (0.039010, 0.086173), (0, 2, 3): (0.360804, 0.0, 0.0), (1, 2, 3): (0.0, 0.0, 0.0)}


@pytest.mark.parametrize("masked", GAPS)
def test_rows_that_look_ahead_are_right_in_the_mean_for_any_mask_and_causal_ones_for_suffixes(masked: Any) -> None:
    """E[row | what is shown] against p(x_l | what is shown), all in one block: the reference's gaps of causal rows."""
    table = {text: np.exp(_logprob(text)) for text in product(range(VOCABULARY), repeat=4)}
    shown = [at for at in range(4) if at not in masked]
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for text in table:
        groups.setdefault(tuple(text[at] for at in shown), []).append(text)
    gaps = {"causal": [0.0] * len(masked), "ahead": [0.0] * len(masked)}
    for texts in groups.values():
        p_N = np.array([table[text] for text in texts])
        weight, p_N = p_N.sum(), p_N / p_N.sum()
        for index, token in enumerate(masked):
            right = np.bincount([text[token] for text in texts], p_N, VOCABULARY)
            rows = {"causal": np.zeros(VOCABULARY), "ahead": np.zeros(VOCABULARY)}
            for text, p in zip(texts, p_N, strict=True):
                loo = np.array([table[(*text[:token], v, *text[token + 1 :])] for v in range(VOCABULARY)])
                rows["causal"] += p * np.exp(log_p(text)[token])
                rows["ahead"] += p * loo / loo.sum()
            for name, row in rows.items():
                gaps[name][index] += weight * kl(right, row)
    assert gaps["causal"] == pytest.approx(list(GAPS[masked]), abs=2e-6)
    assert gaps["ahead"] == pytest.approx([0.0] * len(masked), abs=1e-9)


def test_the_loss_on_leave_one_out_rows_is_the_reference_s() -> None:
    first = looked(ready(5), Reference()).micro[0]
    assert first.teacher is not None and first.teacher.ids_NK is not None and first.teacher.logprobs_NK is not None
    hidden_ND = torch.cat([torch.tensor(STUDENT, dtype=torch.float64), torch.full((4, 5), torch.nan).double()])

    def loss(teacher: Any, **settings: Any) -> list[float]:
        term = token_term("tcs", "tcs", 1.0, **settings)
        found = head_loss(
            hidden_ND[first.view.rows_N], torch.eye(5, dtype=torch.float64), first.view.labels_N, teacher, [term]
        )
        return list(found.per_term["tcs"].tolist())

    two = replace(first.teacher, ids_NK=first.teacher.ids_NK[:, :2], logprobs_NK=first.teacher.logprobs_NK[:, :2])
    assert loss(two) == pytest.approx([1.049179, 0.377924], abs=2e-5)
    z_RV = torch.tensor(STUDENT).double().log_softmax(-1)
    expected = [kl(LEAVE_ONE_OUT[token], z_RV[token].exp()) for token in (1, 3)]
    assert loss(first.teacher) == pytest.approx(expected, abs=1e-4)
    # At another temperature: both sides softened, by a normaliser of the candidates' own.
    warm = looked(ready(5, temperature=2.0), Reference()).micro[0].teacher
    softened = []
    for token in (1, 3):
        p = np.asarray(LEAVE_ONE_OUT[token]) ** 0.5
        softened.append(kl(p / p.sum(), (torch.tensor(STUDENT[token]).double() / 2).softmax(-1)))
    assert loss(warm, temperature=2.0) == pytest.approx(softened, abs=1e-4)


def test_an_ensemble_s_rows_at_a_temperature_are_replaced_with_those_at_1() -> None:
    """They hold logprobs at every temperature instead of a normaliser."""
    plain = ready(5, temperature=2.0)
    teachers = [each.teacher for each in plain.micro]
    mixed = tuple(
        replace(each, teacher=replace(
            rows, log_z_NT=None, tempered_logprobs_NKT=rows.logprobs_NK.float()[:, :, None] / 2 - rows.log_z_NT[:, None]
        ))
        for each, rows in zip(plain.micro, teachers, strict=True)
    )  # fmt: skip
    for one, other in zip(
        looked(plain, Reference()).micro, looked(replace(plain, micro=mixed), Reference()).micro, strict=True
    ):
        expected, found = (
            read_support(each.teacher, "top_k", 2.0, 5, torch.ones(len(each.view.labels_N), dtype=torch.bool))
            for each in (one, other)
        )
        assert torch.equal(found.ids_NK, expected.ids_NK)
        torch.testing.assert_close(found.logprobs_NK, expected.logprobs_NK)


@pytest.mark.parametrize("temperature", [2.0, 1000.0])
def test_ids_that_are_no_candidates_have_no_mass_at_any_temperature(temperature: float) -> None:
    first = looked(ready(5, temperature=temperature), Reference(), candidates=1).micro[0]
    found = read_support(first.teacher, "top_k", temperature, 5, torch.ones(2, dtype=torch.bool))
    # The likeliest id and the clean token, which is the likeliest of the second row.
    assert found.live_NK.sum(1).tolist() == [2, 1]
    torch.testing.assert_close(found.logprobs_NK.exp().sum(1), torch.ones(2))


def test_candidates_share_what_comes_before_and_end_with_the_window() -> None:
    teacher = Reference()
    looked(ready(5), teacher, window=1, candidates=2)
    texts = [text for text, _ in teacher.asked if len(text) == 3]  # of token 1: its two likeliest and the clean one
    assert sorted(texts) == [[3, 0, 4], [3, 1, 4], [3, 2, 4]]
    assert {rows for text, rows in teacher.asked if len(text) == 3} == {(0, 2)}
    # Token 3 is the last: nothing follows, so the row is the causal one, given that it is a candidate.
    assert sorted(text for text, rows in teacher.asked if rows == (2, 3)) == [[3, 1, 4, 1], [3, 1, 4, 2]]


def test_the_clean_token_and_the_student_s_are_always_tried() -> None:
    ids_MK = np.array([[7, 3, 5, 1], [7, 3, 5, 1]])
    assert candidates(ids_MK, 2, np.array([9, 7]), None).tolist() == [[7, 3, 9], [3, 7, -1]]
    assert candidates(ids_MK, 4, np.array([9, 7]), np.array([8, 7])).tolist() == [[7, 3, 9, 8], [3, 5, 1, 7]]
    assert candidates(np.array([[7]]), 1, np.array([9]), np.array([8])).tolist() == [[9]]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


AHEAD = ("student=diffusion", "student.diffusion.block_size=4", "distillation=tcs", "distillation.lookahead.window=3",
         "distillation.lookahead.candidates=4", "distillation.lookahead.positions=6", "teacher=remote",
         "run.steps=4", "checkpoint.every=2")  # fmt: skip


def test_a_run_looks_ahead_the_same_however_it_is_cut_and_resumed(workshop: Workshop, tmp_path: Path) -> None:
    whole = workshop.settings(tmp_path / "whole", *AHEAD)
    targets = ScriptedTargets()
    assert run_here(whole, targets) == loop.DONE
    run, part = tmp_path / "whole" / "run", tmp_path / "part"
    shutil.copytree(run, part / "run")
    shutil.rmtree(part / "run" / "checkpoints" / "step-00000004")
    assert run_here(workshop.settings(part, *AHEAD), ScriptedTargets()) == loop.DONE
    assert trace_of(part / "run") == trace_of(run) and final_files(part / "run", 4) == final_files(run, 4)
    cut_small = workshop.settings(tmp_path / "cut", *AHEAD, "optim.micro_batch_rows=1", "run.steps=1")
    plain = workshop.settings(tmp_path / "plain", *AHEAD, "distillation.lookahead.window=null", "run.steps=1")
    for arguments in (cut_small, plain):
        assert run_here(arguments, ScriptedTargets()) == loop.DONE
    first = lines_of(run)[0]
    (cut_line,), (plain_line,) = (lines_of(tmp_path / name / "run") for name in ("cut", "plain"))
    assert cut_line["loss/tcs"] == pytest.approx(first["loss/tcs"], rel=1e-4)
    assert abs(plain_line["loss/tcs"] - first["loss/tcs"]) > 1e-3
    assert plain_line["loss/cross_entropy"] == pytest.approx(first["loss/cross_entropy"], rel=1e-6)


REFUSED = {
    "student": (("student=causal", "student.diffusion.block_size=null", "distillation=logits_only"),
                "predicts each token from the preceding ones only"),
    "candidates": (("distillation.lookahead.candidates=17",), "candidates is 17, but teacher.top_k is 16"),
    "loss": (("distillation=cross_entropy",), "no loss compares with the teacher's top K"),
    "support": (("distillation=cross_entropy", "distillation.terms.kd={kind: forward_kl, support: gather}"),
                "no loss compares with the teacher's top K"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_looked_ahead_of_is_refused(workshop: Workshop, tmp_path: Path, name: str) -> None:
    more, message = REFUSED[name]
    kept = [each for each in AHEAD if each.split("=")[0] not in {override.split("=")[0] for override in more}]
    with pytest.raises(ValueError, match=message):
        run_here(workshop.settings(tmp_path, *kept, *more), ScriptedTargets())
