"""Held-out figures of block-diffusion students: by mask rate, infilling, what is written as the teacher judges it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo.diffusion_curve import area_under, tokens_per_pass_at
from student_trainer import loop
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import EVALUATION, ViewSeed
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.compose import compose
from student_trainer.evaluation.decoding import Decoding, spans_of
from student_trainer.evaluation.mask_rates import MaskRates, masked_share
from student_trainer.ranks import ALONE
from student_trainer.rollouts import block_decoding
from student_trainer.settings import DiffusionSettings, EvaluationSettings, StudentSettings
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.diffusion_record import DiffusionRecord
from student_trainer.students.student import Student
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets
from tests.models import save_tiny_llama
from tests.trainer_run import ScriptedTargets, Workshop, lines_of, run_here

MASK = 500


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    settings = StudentSettings(
        checkpoint_path=str(save_tiny_llama(tmp_path_factory.mktemp("model"))), compute="float32",
        architecture="diffusion", diffusion=DiffusionSettings(block_size=16, threshold=0.05),
    )  # fmt: skip
    return load_student(settings, torch.device("cpu"))


def batch_of(*lengths: int, seq_len: int = 96, prompt: int = 0) -> Batch:
    draw = np.random.default_rng(3)
    rows = [
        [Placed(0, f"a:{row}", draw.integers(2, 60, n, dtype=np.int32), np.arange(n) >= prompt)]
        for row, n in enumerate(lengths)
    ]
    return build_batch(0, rows, seq_len, 0, ("a",))


@pytest.mark.parametrize("family", ["in_place", "token_shift"])
def test_cross_entropy_goes_to_the_share_of_its_block_that_is_masked(family: Any) -> None:
    """Against a count one by one, of packed documents with prompts."""
    rows = [[Placed(0, "x", np.arange(2, 2 + n, dtype=np.int32), np.arange(n) >= 3) for n in (9, 14)]] * 3
    batch = build_batch(0, rows, 32, 0, ("x",))
    record = DiffusionRecord(4, MASK, family, "block_causal")
    reader = DiffusionReader(record, masks="suffix", complementary=False)
    views = reader.views(batch, ViewSeed(1, EVALUATION))
    assert len(views) == 2, "held-out text is masked the same way whatever a student learns by"
    rates = MaskRates(record, torch.device("cpu"))
    sums: dict[int, list[float]] = {}
    for view in views:
        noisy_BT = view.input_ids_BT[:, :32].numpy()
        row_C, column_C = batch.counted()
        expected = []
        for counted in view.counted_N.tolist():
            row, place = row_C[counted], column_C[counted] + 1
            assert noisy_BT[row, place] == MASK
            same = (batch.document_ids_BT[row] == batch.document_ids_BT[row, place]) & (
                batch.position_ids_BT[row] // 4 == batch.position_ids_BT[row, place] // 4
            )
            expected.append((noisy_BT[row, same] == MASK).mean())
        assert masked_share(view, record).tolist() == pytest.approx(expected)
        values_N = torch.arange(len(expected), dtype=torch.float32)
        for share, value in zip(expected, values_N.tolist(), strict=True):
            sums.setdefault(25 * math.ceil(4 * share), []).append(value)
        nothing_N = torch.zeros(len(expected), dtype=torch.int64)
        rates.add(MicroBatch(view, nothing_N, nothing_N, None), values_N)
    assert rates.metrics(ALONE) == pytest.approx({
        f"cross_entropy_masked_{rate}": float(np.mean(values)) for rate, values in sorted(sums.items())
    })  # fmt: skip
    assert len(sums) >= 3


def test_spans_are_the_same_for_all_block_sizes_and_spread_over_documents() -> None:
    batches = [batch_of(90, 40, 19, 96)]
    spans = spans_of(batches)
    assert len(spans) == 5 + 2 + 0 + 5
    assert len({tuple(ids_N[:5]) for ids_N, _ in spans[:3]}) == 3, "one of each document first"
    for ids_N, start in spans:
        assert start % 16 == 4 and start >= 20 and start + 4 <= len(ids_N) <= 96
        assert len(ids_N) <= (start // 64 + 1) * 64
    assert not spans_of([batch_of(90, prompt=89)]), "a prompt is not filled in"


def judge_of(nats: float, asked: list[Batch]) -> Any:
    """A teacher that gives every token the same logprob, the last row NaN as on the wire."""

    def judge(batch: Batch) -> BatchTargets:
        asked.append(batch)
        answers = []
        for document in batch.documents:
            logprobs_R = np.full(document.stop - document.start, -nats, np.float32)
            logprobs_R[-1] = np.nan
            answers.append(TokenTargets(start=0, next_logprob=logprobs_R))
        return BatchTargets(tuple(answers), TargetSpec(("score",)), "x")

    return judge


def test_what_is_filled_in_and_written_is_counted(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvaluationSettings(
        infilled=6, thresholds=(0.02, 1.0), judged=3, prompt_tokens=9, sample_tokens=20, temperature=0.7
    )
    batches, asked = [batch_of(90, 60, 80, 96)], []  # type: ignore[var-annotated]
    decoding = Decoding(settings, {"a": batches}, (), judge_of(2.5, asked))
    figures = decoding.metrics(student, "a", lambda: None)
    assert figures == decoding.metrics(student, "a", lambda: None), "two evaluations draw alike"
    assert figures["infilled_spans"] == 6 and 0 <= figures["infilled_exactly"] <= figures["infilled_tokens"] <= 1  # type: ignore[operator]
    for name in ("written_0.02", "written_1"):
        assert figures[f"{name}_perplexity"] == pytest.approx(math.exp(2.5), rel=1e-5)
        assert figures[f"{name}_tokens"] == 60 and 0 < figures[f"{name}_entropy"] <= math.log(60)  # type: ignore[operator]
    # One by one: nine given, so a block ends after 7, then 13 more; one commit each.
    assert figures["written_1_tokens_per_pass"] == pytest.approx(20 / 21)
    assert figures["written_0.02_tokens_per_pass"] > 1.2  # type: ignore[operator]
    assert [batch.tokens_BT.shape for batch in asked[:2]] == [(3, 29)] * 2
    assert asked[0].loss_mask_BT.sum() == 60 and not asked[0].loss_mask_BT[:, :8].any()

    # A student that knows the text fills it in.
    def knows(self: Any, hidden_MD: torch.Tensor, uniform_M: Any) -> tuple[np.ndarray, np.ndarray]:
        row_M, column_M = np.nonzero(self.rows.masked_PC)
        truth: Sequence[np.ndarray] = [ids_N for ids_N, _ in decoding._spans["a"]]
        ids_M = [truth[row][column - self.rows.pad_P[row]] for row, column in zip(row_M, column_M, strict=True)]
        ids_M[0] = (ids_M[0] + 1) % 60
        return np.array(ids_M), np.zeros(len(ids_M))

    monkeypatch.setattr(block_decoding._Filling, "choose", knows)
    figures = Decoding(settings, {"a": batches}, (), None).metrics(student, "a", lambda: None)
    assert figures == {"infilled_exactly": pytest.approx(5 / 6), "infilled_tokens": pytest.approx(23 / 24),
                       "infilled_spans": 6}  # fmt: skip


def test_the_area_under_parallelism_is_that_of_the_reference() -> None:
    points = [(1.0, 80.0), (2.0, 79.0), (4.0, 76.0)]
    assert area_under(points, 80) == pytest.approx(299.552345, abs=1e-6)
    assert area_under(points, 85) == pytest.approx(264.731145, abs=1e-6)
    assert area_under([*points, (9.0, 74.9)], 80) == pytest.approx(299.552345, abs=1e-6), "it lost more than five"
    assert area_under(points[::-1], 80) == area_under(points, 80)
    with pytest.raises(ValueError, match="got no points"):
        area_under([], 80)


def test_tokens_a_pass_at_a_perplexity_lie_on_the_curve() -> None:
    curve = [(1.0, 20.0), (2.0, 40.0), (3.0, 30.0)]
    assert tokens_per_pass_at(curve, 20.0) == 1.0
    assert tokens_per_pass_at(curve, math.sqrt(20 * 40)) == pytest.approx(1.5)
    assert tokens_per_pass_at(curve, 35.0) == 3.0
    assert tokens_per_pass_at(curve, 19.0) is None
    assert tokens_per_pass_at(curve, 100.0) == 3.0


def test_a_run_has_them_all_and_two_students_that_mask_otherwise_are_evaluated_alike(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "workshop")
    settings = (
        "student=diffusion", "student.diffusion.block_size=4", "distillation=tcs", "run.steps=1", "evaluation.every=1",
        "evaluation.thresholds=[0.05,1]", "evaluation.judged=2", "evaluation.prompt_tokens=5", "evaluation.infilled=3",
        "evaluation.sample_tokens=7", "teacher.kind=remote", "data.held_out_rows=4",
    )  # fmt: skip
    first = []
    for masks in ("uniform", "suffix"):
        arguments = workshop.settings(tmp_path / masks, *settings, f"student.diffusion.masks={masks}")
        assert run_here(arguments, ScriptedTargets()) == loop.DONE
        lines = lines_of(tmp_path / masks / "run", "evaluation.jsonl")
        first.append(lines[0])
        assert len(lines) == 2
        for line in lines:
            for source in ("a", "b"):
                figures = line[source]
                assert {"cross_entropy_masked_100", "infilled_tokens", "written_0.05_tokens_per_pass"} <= figures.keys()
                assert 1 < figures["written_1_perplexity"] < 1e9
    assert first[0] == first[1]


def test_settings_of_them_warn_where_they_have_no_effect(tmp_path: Path) -> None:
    for given, why in (
        (["evaluation.infilled=3"], "evaluation.infilled has no effect: student.architecture is not diffusion"),
        (["student=diffusion", "evaluation.judged=3"], "judged has no effect: evaluation.thresholds is empty"),
        (["student=diffusion", "evaluation.thresholds=[0.5]", "teacher=none", "distillation=cross_entropy"],
         "evaluation.thresholds has no effect: teacher.kind is none"),
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=why):
            compose(["student.checkpoint_path=x", "data=text", "data.sources.text.path=y", *given])
    with pytest.raises(ValueError, match=r"evaluation\.thresholds"):
        compose(["evaluation.thresholds=[1.5]"])
