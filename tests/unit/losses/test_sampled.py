"""Targets that are draws from the teacher: unbiased, and read right from their ragged form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from student_trainer.losses import TeacherRows, head_loss, token_term

TERM = token_term("rs", "sampled", 1.0)


def draw(probability_NV: torch.Tensor, draws: int) -> TeacherRows:
    """Ragged rows of distinct ids and how often each came."""
    ids, counts, offsets = [], [], [0]
    for row_V in probability_NV:
        unique, count = torch.multinomial(row_V, draws, replacement=True).unique(return_counts=True)
        ids.append(unique)
        counts.append(count)
        offsets.append(offsets[-1] + len(unique))
    return TeacherRows(
        sampled_offsets=torch.tensor(offsets), sampled_ids=torch.cat(ids).int(), sampled_counts=torch.cat(counts).int()
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_value_and_gradient_are_cross_entropy_with_the_counts(temperature: float) -> None:
    hidden_ND = torch.randn(15, 12, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    rows = replace(draw((torch.randn(15, 40) / temperature).softmax(-1), 9), sampled_temperature=temperature)
    assert rows.sampled_offsets is not None and rows.sampled_ids is not None and rows.sampled_counts is not None
    target_NV = torch.zeros(15, 40, dtype=torch.float64)
    for row in range(15):
        span = slice(int(rows.sampled_offsets[row]), int(rows.sampled_offsets[row + 1]))
        target_NV[row, rows.sampled_ids[span].long()] = rows.sampled_counts[span].double() / 9
    labels_N = torch.randint(40, (15,))
    terms = [token_term("rs", "sampled", temperature=temperature), token_term("ce", "cross_entropy", 0.5)]
    result = head_loss(hidden_ND, weight_VD, labels_N, rows, terms, chunk_rows=4)
    logits_NV = hidden_ND @ weight_VD.T
    soft_N = torch.nn.functional.cross_entropy(logits_NV / temperature, target_NV, reduction="none")
    torch.testing.assert_close(result.per_term["rs"], soft_N.detach())
    expected = soft_N.sum() + 0.5 * torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    leaves = (hidden_ND, weight_VD)
    for ours, theirs in zip(
        torch.autograd.grad(result.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_mean_gradient_over_draws_is_that_of_the_whole_teacher() -> None:
    """One row repeated 20,000 times with fresh draws: the mean gradient lies within five standard errors."""
    repeats, vocab, draws = 20_000, 24, 6
    student_V, teacher_V = torch.randn(2, vocab) * 2
    probability_V = teacher_V.softmax(-1)
    counts_NV = torch.distributions.Multinomial(draws, probability_V).sample((repeats,))
    live_NV = counts_NV > 0
    rows = TeacherRows(
        sampled_offsets=torch.cat([torch.zeros(1, dtype=torch.long), live_NV.sum(1).cumsum(0)]),
        sampled_ids=live_NV.nonzero()[:, 1],
        sampled_counts=counts_NV[live_NV].long(),
    )
    hidden_NV = student_V.repeat(repeats, 1).requires_grad_()
    head_loss(hidden_NV, torch.eye(vocab), torch.zeros(repeats, dtype=torch.long), rows, [TERM]).total.backward()
    assert hidden_NV.grad is not None
    exact_V = student_V.softmax(-1) - probability_V
    error_V = (probability_V * (1 - probability_V) / draws / repeats).sqrt()
    assert bool(((hidden_NV.grad.mean(0) - exact_V).abs() < 5 * error_V + 1e-6).all())


def test_selecting_rows_keeps_each_rows_draws() -> None:
    rows = draw(torch.randn(12, 30).softmax(-1), 7)
    ids_NU, counts_NU = rows.sampled_padded()
    for index in (torch.tensor([7, 0, 3]), slice(2, 9), torch.arange(12) % 2 == 0, torch.tensor([], dtype=torch.long)):
        part_ids, part_counts = rows.select(index).sampled_padded()
        width = part_ids.shape[1]
        torch.testing.assert_close(part_counts.long(), counts_NU[index][:, :width])
        assert int(counts_NU[index][:, width:].sum()) == 0
        live = part_counts > 0
        assert torch.equal(part_ids[live], ids_NU[index][:, :width][live])


def test_a_temperature_other_than_the_draws_is_refused() -> None:
    rows = draw(torch.randn(3, 10).softmax(-1), 5)
    hidden_ND, weight_VD, labels_N = torch.randn(3, 4), torch.randn(10, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"drawn at 1\.0"):
        head_loss(hidden_ND, weight_VD, labels_N, rows, [token_term("rs", "sampled", 1.0, temperature=2.0)])
