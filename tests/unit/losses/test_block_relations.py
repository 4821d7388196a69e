"""Relations and maps within blocks: the reference's figures, the formula in float64, when they are zero, runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer import build_components as building
from student_trainer import loop
from student_trainer.batch.align import cut
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.view import ViewSeed
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.compose import compose
from student_trainer.losses import token_term
from student_trainer.losses.block_relations import BlockTable, block_relations
from student_trainer.losses.kinds import term_of
from student_trainer.settings import DiffusionSettings, StudentSettings
from student_trainer.settings.attention import AttentionSettings
from teacher_proto.compute.relations import QKV
from teacher_proto.requests import TargetSpec
from tests.models import save_tiny_llama
from tests.trainer_run import ScriptedTargets, Workshop, lines_of, run_here
from tests.unit.trainer.test_align import batch_of
from tests.unit.trainer.test_attention_run import StatesHere

CPU = torch.device("cpu")
DOCUMENTS = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
PLACES = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
LENGTHS = (6, 3, 5, 5)


def states(seed: int, *shape: int, heads: int = 2, shared: int = 1) -> QKV:
    draw = torch.Generator().manual_seed(seed)
    make = lambda n: torch.randn(*shape, n, 4, generator=draw, dtype=torch.float64)  # noqa: E731
    return QKV(make(heads), make(heads // shared), make(heads // shared))


def test_the_reference_s_map_loses_what_the_student_gives_to_the_future() -> None:
    """t = (.5, .3, .2, 0) and s = (.4, .2, .1, .3) at a block's third token: .371841 = .015166 + .356675."""
    t, s = torch.tensor([0.5, 0.3, 0.2, 1e-30]), torch.tensor([0.4, 0.2, 0.1, 0.3])
    whole = float((t * (t / s).log()).sum())
    assert whole == pytest.approx(0.371841, abs=1e-6)
    assert -math.log(1 - float(s[3])) == pytest.approx(0.356675, abs=1e-6)

    def of(p_4: torch.Tensor) -> QKV:
        # One head of width 1: every row's map is p, renormalised to what it sees.
        return QKV(torch.ones(4, 1, 1), p_4.log()[:, None, None], torch.zeros(4, 1, 1))

    ours, theirs = QKV(*(part[None] for part in of(s))), of(t)
    blocks = BlockTable.of(np.zeros((1, 4), int), np.zeros((1, 4), int))
    (mean,) = block_relations(ours, [theirs], blocks, form="maps", relation_heads=1, last_rows=False)
    rows = []
    for i in range(1, 5):
        p, q = t[:i] / t[:i].sum(), s[:i] / s[:i].sum()
        rows.append(float((p * (p / q).log()).sum()))
    assert rows[2] == pytest.approx(0.015166, abs=1e-6)
    assert rows[2] == pytest.approx(whole - 0.356675, abs=1e-6)
    assert float(mean) == pytest.approx(sum(rows) / 4, rel=1e-5)
    (last,) = block_relations(ours, [theirs], blocks, form="maps", relation_heads=1, last_rows=True)
    assert float(last) == pytest.approx(rows[3], rel=1e-5)


def test_the_table_has_each_block_once() -> None:
    table = BlockTable.of(DOCUMENTS, PLACES // 4)
    assert table.place_BlS.tolist() == [
        [0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, -1], [10, 11, 12, 13], [14, -1, -1, -1], [15, 16, 17, 18],
        [19, -1, -1, -1],
    ]  # fmt: skip
    assert table.document_Bl.tolist() == [0, 0, 1, 2, 2, 3, 3]
    empty = BlockTable.of(np.full((1, 3), -1), np.zeros((1, 3), int))
    assert empty.place_BlS.shape[0] == 0
    nothing = block_relations(states(0, 1, 3), [], empty, form="paper", relation_heads=2, last_rows=False)
    assert nothing.shape == (0,)


@pytest.mark.parametrize("last_rows", [False, True])
@pytest.mark.parametrize("form", ["official", "paper", "minilm", "maps"])
def test_value_and_gradient_follow_the_formula_in_float64(form: str, last_rows: bool) -> None:
    student, heads = states(1, 2, 10, shared=2), 4
    teacher = [states(seed, length, shared=2) for seed, length in enumerate(LENGTHS, 2)]
    for part in student:
        part.requires_grad_()
    blocks = BlockTable.of(DOCUMENTS, PLACES // 4)
    ours_D = block_relations(student, teacher, blocks, form=form, relation_heads=heads, last_rows=last_rows)
    weights_D = torch.tensor([0.3, -1.0, 2.0, 0.7])
    (ours_D * weights_D).sum().backward()
    gradients = [part.grad.clone() if part.grad is not None else torch.zeros_like(part) for part in student]
    for part in student:
        part.grad = None
    expected = []
    starts = ((0, 0), (0, 6), (1, 0), (1, 5))
    for (row, start), theirs, length in zip(starts, teacher, LENGTHS, strict=True):
        values = []
        for first in range(0, length, 4):
            span = slice(first, min(first + 4, length))
            own = QKV(*(part[row, start + span.start : start + span.stop] for part in student))
            values += _rows(own, QKV(*(part[span] for part in theirs)), form, heads)[-1 if last_rows else 0 :]
        expected.append(torch.stack(values).mean())
    expected_D = torch.stack(expected)
    torch.testing.assert_close(ours_D.double(), expected_D.detach(), rtol=1e-5, atol=1e-7)
    (expected_D * weights_D).sum().backward()
    for ours, part in zip(gradients, student, strict=True):
        theirs = part.grad if part.grad is not None else torch.zeros_like(part)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def _rows(ours: QKV, theirs: QKV, form: str, heads: int) -> list[torch.Tensor]:
    """The value of each row of one block, table by table."""
    size = len(ours.query)
    total = [torch.zeros((), dtype=torch.float64) for _ in range(size)]
    tables = []
    for each in (theirs, ours):
        if form == "maps":
            key = each.key.repeat_interleave(2, 1)
            tables.append([torch.einsum("ihd,jhd->hij", each.query, key) / 2.0])
            continue
        tables.append([])
        for part in each:
            cut_RTd = part.reshape(size, heads, -1).transpose(0, 1)
            cut_RTd = cut_RTd / cut_RTd.norm(dim=-1, keepdim=True) if form == "official" else cut_RTd
            scale = 1.0 if form == "official" else cut_RTd.shape[-1] ** -0.5
            tables[-1].append(cut_RTd @ cut_RTd.mT * scale)
    for p, q in zip(*tables, strict=True):
        for i in range(size):
            upto = i + 1 if form in ("maps", "minilm") else size
            log_p, log_q = p[:, i, :upto].log_softmax(-1), q[:, i, :upto].log_softmax(-1)
            share = {"maps": 1 / 2, "official": 1 / heads**2}.get(form, 1 / heads)
            total[i] = total[i] + share * (log_p.exp() * (log_p - log_q)).sum()
    return total


def test_maps_of_other_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="the student has 2 heads and the teacher 4: maps are compared head by head"):
        block_relations(
            states(1, 2, 10), [states(2, n, heads=4) for n in LENGTHS], BlockTable.of(DOCUMENTS, PLACES // 4),
            form="maps", relation_heads=1, last_rows=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> StatesHere:
    return StatesHere(save_tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7), layer=1)


@pytest.mark.parametrize("form", ["official", "maps"])
def test_a_student_that_is_the_teacher_has_no_loss_where_its_clean_half_is_causal(
    tmp_path: Path, teacher: StatesHere, form: Any
) -> None:
    """Above the first layer a block-causal one has: its states have seen the rest of their block."""
    folder = save_tiny_llama(tmp_path / "same", seed=7)
    batch = batch_of([9, 14, 1], [20], seq_len=48)
    attention = tuple(teacher.of(batch.tokens_BT[d.row, d.start : d.stop]) for d in batch.documents)
    targets = BatchTargets((None,) * len(batch.documents), TargetSpec(()), "", attention)
    found = {}
    for clean_half in ("causal", "block_causal"):
        diffusion = DiffusionSettings(block_size=4, clean_half=clean_half)
        student = load_student(
            StudentSettings(
                checkpoint_path=str(folder), compute="float32", architecture="diffusion", diffusion=diffusion
            ),
            CPU,
        )  # fmt: skip
        settings = AttentionSettings(coefficient=1.0, relation_heads=8, form=form, within="blocks", layer=1)
        terms = (token_term("ce", "cross_entropy", 0.0), term_of("attention", settings))
        values = [student.loss(m, terms, None).per_term["attention"] for m in cut(batch, targets, student, ViewSeed(0))]
        found[clean_half] = float(torch.cat(values).abs().max())
    assert found["causal"] < 1e-5 < 1e-4 < found["block_causal"], found


def test_a_run_learns_all_three_and_cut_rows_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, teacher: StatesHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(building, "open_attention", lambda *_: teacher)
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    arguments = ("student=diffusion", "student.diffusion.block_size=4", "student.diffusion.clean_half=causal",
                 "distillation=tcs", "distillation.gamma_attention=50", "distillation.attention.relation_heads=8",
                 "teacher=remote", "run.steps=3")  # fmt: skip
    for name, more in (("whole", ()), ("cut", ("optim.micro_batch_rows=1",))):
        assert run_here(workshop.settings(tmp_path / name, *arguments, *more), ScriptedTargets()) == loop.DONE
    for line, other in zip(*(lines_of(tmp_path / name / "run") for name in ("whole", "cut")), strict=True):
        parts = line["loss/cross_entropy"] + line["loss/tcs"] + 50 * line["loss/attention"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6) and line["loss/attention"] > 0
        assert other["loss/attention"] == pytest.approx(line["loss/attention"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
    with pytest.raises(
        ValueError, match="within is blocks, but the student does not read by blocks: use student=diffusion"
    ):
        run_here(workshop.settings(tmp_path / "c", "distillation.attention.within=blocks", "teacher=remote",
                                   "distillation.attention.coefficient=1"), ScriptedTargets())  # fmt: skip
    with pytest.raises(ValueError, match="form is maps, which are only compared within blocks"):
        compose(workshop.settings(tmp_path / "d", "distillation.attention.form=maps"))
