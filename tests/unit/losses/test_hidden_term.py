"""The term on final hidden states: its formula and gradient in float64, rows without a teacher, and a run by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from student_trainer import loop
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.batch.view import CausalDocuments, View
from student_trainer.losses.hidden_term import FinalHiddenTerm
from student_trainer.losses.kinds import term_of
from student_trainer.losses.terms import Captured
from student_trainer.settings.terms import FinalHiddenSettings
from tests.models import save_tiny_llama
from tests.trainer_run import Workshop, lines_of, run_here

TERM = FinalHiddenTerm("hidden", FinalHiddenSettings(), 1.0)


def micro_of(theirs_ND: Tensor, valid_N: Tensor | None = None) -> MicroBatch:
    count = len(theirs_ND)
    index_N = torch.arange(count)
    view = View(index_N[None], index_N[None], CausalDocuments(torch.zeros(1, count, dtype=torch.int32)), index_N,
                index_N, index_N)  # fmt: skip
    return MicroBatch(view, index_N, index_N, TeacherRows(teacher_hidden_NE=theirs_ND, valid_N=valid_N))


def rows(seed: int) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


def test_value_and_gradient_are_those_of_the_formula_in_float64() -> None:
    ours_ND, theirs_ND = rows(0).requires_grad_(), rows(1)
    found_N = TERM.values(Captured(ours_ND, {}), micro_of(theirs_ND.half()), None)
    exact_ND, target_ND = ours_ND.detach().double().requires_grad_(), theirs_ND.half().double()
    expected_N = (exact_ND - target_ND).pow(2).sum(1) / target_ND.pow(2).sum(1)
    torch.testing.assert_close(found_N.double(), expected_N)
    weights_N = torch.arange(1.0, 6.0)
    (found_N * weights_N).sum().backward()
    (expected_N * weights_N.double()).sum().backward()
    assert ours_ND.grad is not None and exact_ND.grad is not None
    torch.testing.assert_close(ours_ND.grad.double(), exact_ND.grad, rtol=1e-5, atol=1e-6)
    assert not TERM.values(Captured(rows(1), {}), micro_of(rows(1)), None).any()


def test_rows_without_a_teacher_count_nothing_whatever_stands_there() -> None:
    theirs_ND, ours_ND = rows(1), rows(0).requires_grad_()
    theirs_ND[2] = float("nan")
    valid_N = torch.tensor([True, True, False, True, True])
    found_N = TERM.values(Captured(ours_ND, {}), micro_of(theirs_ND, valid_N), None)
    assert found_N[2] == 0.0 and found_N.isfinite().all()
    found_N.sum().backward()
    assert ours_ND.grad is not None and ours_ND.grad.isfinite().all()
    assert not ours_ND.grad[2].any() and ours_ND.grad[valid_N].any(1).all()


def test_clean_rows_behind_the_labels_are_left_out() -> None:
    ours_ND = torch.cat([rows(0), rows(2)])
    assert torch.equal(TERM.values(Captured(ours_ND, {}), micro_of(rows(1)), None),
                       TERM.values(Captured(rows(0), {}), micro_of(rows(1)), None))  # fmt: skip


def test_another_width_is_refused_with_what_to_use() -> None:
    with pytest.raises(ValueError, match=r"the student's is 8, the teacher's 6\. Use forward_kl with support=full"):
        TERM.values(Captured(rows(0), {}), micro_of(rows(1)[:, :6]), None)


def test_it_asks_for_hidden_states() -> None:
    made = term_of("final_hidden", FinalHiddenSettings(coefficient=0.5))
    assert made.needs.kinds == {"hidden"} and made.coefficient == 0.5
    assert replace(made, coefficient=1.0).kind == "final_hidden"


def test_a_student_learns_by_it_from_a_teacher_of_its_width(workshop: Workshop, tmp_path: Path) -> None:
    student = save_tiny_llama(tmp_path / "other", num_hidden_layers=1, seed=5)
    given = workshop.settings(
        tmp_path, f"student.checkpoint_path={student}", "teacher=local", f"teacher.model={workshop.student}",
        "distillation.terms.final_hidden.coefficient=1", "run.steps=12", "optim.learning_rate=1e-2",
        "teacher.sanity=off",  # a random model is no judge of the text
    )  # fmt: skip
    assert run_here(given) == loop.DONE
    lines = lines_of(tmp_path / "run")
    first, last = (sum(line["loss/final_hidden"] for line in part) for part in (lines[:4], lines[-4:]))
    assert last < first
    assert all(line["weighted/final_hidden"] == line["loss/final_hidden"] for line in lines)
