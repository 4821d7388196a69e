"""Targets beside the student's rows: every label with its own teacher row, under either shift, however it is cut."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from student_trainer.data.batch import Batch, Placed, build_batch
from student_trainer.losses import Term, head_loss
from student_trainer.targets.align import micro_batches
from student_trainer.targets.protocol import Ask, BatchTargets, counted_rows
from teacher_service.scripted_model import scripted_head, scripted_hidden
from tests.trainer_run import ScriptedTargets

V = 64
ASK = Ask(("top_k",), 16, (2.0,))


def batch_of(*rows: list[int], seq_len: int = 24, masks: dict[tuple[int, int], list[bool]] | None = None) -> Batch:
    """Rows of documents of the given lengths; `masks[row, document]` says which tokens are learnt."""
    draw = np.random.default_rng(sum(map(sum, rows)))
    placed = []
    for r, lengths in enumerate(rows):
        row = []
        for d, length in enumerate(lengths):
            counts = None if masks is None or (r, d) not in masks else np.array(masks[r, d])
            row.append(Placed(d % 2, f"s:{r}:{d}", draw.integers(0, V, length, dtype=np.int32), counts))
        placed.append(row)
    return build_batch(0, placed, seq_len, 0, ("x", "y"))


def targets_of(batch: Batch, ask: Ask = ASK) -> BatchTargets:
    return asyncio.run(ScriptedTargets({"vocab_size": V}).fetch(batch, ask))


def teacher_hidden(batch: Batch) -> torch.Tensor:
    """The scripted teacher's own hidden states in the batch's places [B, T, D]: a student that is the teacher."""
    hidden = np.zeros((*batch.tokens_BT.shape, 32))
    for d in batch.documents:
        hidden[d.row, d.start : d.stop] = scripted_hidden(batch.tokens_BT[d.row, d.start : d.stop])
    return torch.from_numpy(hidden)


MASKS = {(0, 1): [False, True, False, True, True], (1, 0): [False] * 9}
BATCHES = {
    "plain": batch_of([7, 12, 5], [24], [1, 2, 3]),
    "masked": batch_of([10, 5, 3], [9, 8], masks=MASKS),
    "lonely": batch_of([1, 1, 1], [1]),
}


@pytest.mark.parametrize("name", ["plain", "masked"])
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_each_label_has_the_teachers_row_of_its_own_token(name: str, rows: int | None) -> None:
    batch = BATCHES[name]
    parts = micro_batches(batch, targets_of(batch), rows=rows)
    seen = 0
    for part in parts:
        assert part.teacher is not None and part.teacher.next_logprob_N is not None
        flat = part.tokens_BT.flatten()
        for n, place in enumerate(part.rows_N.tolist()):
            assert flat[place + 1] == part.labels_N[n]
            row, column = divmod(place, batch.tokens_BT.shape[1])
            d = next(d for d in batch.documents if d.row == row + part.first_row and d.start <= column < d.stop)
            hidden = scripted_hidden(batch.tokens_BT[d.row, d.start : column + 1])[-1]
            truth = torch.log_softmax(torch.from_numpy(scripted_head(V) @ hidden), 0)[part.labels_N[n]]
            assert float(part.teacher.next_logprob_N[n]) == pytest.approx(float(truth), abs=1e-4)
            assert batch.source_names[int(part.sources_N[n])] == batch.source_names[batch.source_ids_BT[d.row, column]]
            seen += 1
    assert seen == int(batch.loss_mask_BT.sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_is_the_teacher_loses_nothing_only_under_the_right_shift(temperature: float) -> None:
    batch = BATCHES["plain"]
    targets = targets_of(batch)
    head_VD = torch.from_numpy(scripted_head(V).copy())
    term = Term("kl", "top_k_kl", 1.0, temperature=temperature)
    ahead_BTD = teacher_hidden(batch)  # row t predicts token t+1
    own_BTD = torch.roll(ahead_BTD, 1, dims=1)  # row t predicts token t, as an unshifted diffusion student

    def loss(hidden_BTD: torch.Tensor, shift: int) -> float:
        (part,) = micro_batches(batch, targets, teacher_shift=shift)
        rows_ND = hidden_BTD.flatten(0, 1)[part.rows_N]
        return float(head_loss(rows_ND, head_VD, part.labels_N, part.teacher, [term]).total) / len(part.labels_N)

    assert loss(ahead_BTD, 0) == pytest.approx(0, abs=1e-5)
    assert loss(own_BTD, -1) == pytest.approx(0, abs=1e-5)
    assert loss(ahead_BTD, -1) > 0.5 and loss(own_BTD, 0) > 0.5


def test_under_a_shift_the_label_is_the_token_of_the_row_itself() -> None:
    batch = BATCHES["plain"]
    (part,) = micro_batches(batch, None, teacher_shift=-1)
    assert torch.equal(part.tokens_BT.flatten()[part.rows_N], part.labels_N)


def test_rows_that_do_not_count_are_not_asked_for() -> None:
    batch = BATCHES["masked"]
    asked = [counted_rows(batch, d) for d in batch.documents]
    assert asked == [(0, 9), (0, 4), (0, 2), None, (0, 7)]
    first = batch_of([6], masks={(0, 0): [False, False, False, True, True, False]})
    assert counted_rows(first, first.documents[0]) == (2, 4)


def test_documents_of_one_token_need_no_teacher() -> None:
    batch = BATCHES["lonely"]
    assert [counted_rows(batch, d) for d in batch.documents] == [None] * 4
    assert micro_batches(batch, targets_of(batch)) == ()


def test_micro_batches_without_a_label_are_left_out() -> None:
    batch = batch_of([1, 1], [5, 3], [1])
    parts = micro_batches(batch, targets_of(batch), rows=1)
    assert [part.first_row for part in parts] == [1]
