"""Targets beside the student's rows: every label with its own teacher row, whichever row learns it and however it is
cut.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch, counted_rows
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.record_rows import hidden_numbers
from student_trainer.batch.view import Reader, View, ViewSeed
from student_trainer.losses import head_loss, token_term
from student_trainer.students.causal import CausalReader
from student_trainer.targets.open import read_head
from student_trainer.targets.queries import queries_of
from student_trainer.targets.student_support import queries_at
from teacher_proto.errors import InvalidTargetsError
from teacher_proto.requests import TargetSpec
from teacher_service.engines.scripted_model import scripted_head, scripted_hidden
from tests.trainer_run import ScriptedTargets

V = 64
ASK = TargetSpec(("top_k",), 16, (2.0,))


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


def targets_of(batch: Batch, ask: TargetSpec = ASK) -> BatchTargets:
    return asyncio.run(ScriptedTargets({"vocab_size": V}).fetch(batch, queries_of(batch, ask)))


class InPlaceReader(CausalReader):
    """Row t predicts token t itself, as an unshifted diffusion student's."""

    def views(self, batch: Batch, seed: ViewSeed) -> tuple[View, ...]:
        (view,) = super().views(batch, seed)
        return (replace(view, rows_N=view.rows_N + 1),)


def micro_batches(
    batch: Batch, targets: BatchTargets | None, rows: int | None = None, reader: Reader | None = None
) -> tuple[MicroBatch, ...]:
    return cut(batch, targets, reader or CausalReader(), ViewSeed(0), rows=rows)


def teacher_hidden(batch: Batch) -> torch.Tensor:
    """The scripted teacher's own hidden states in the batch's places [B, T, D]: a student that is the teacher."""
    hidden = np.zeros((*batch.tokens_BT.shape, 32))
    for d in batch.documents:
        hidden[d.row, d.start : d.stop] = scripted_hidden(batch.tokens_BT[d.row, d.start : d.stop])
    return torch.from_numpy(hidden)


def documents_before(batch: Batch, part: MicroBatch) -> int:
    return sum(document.row < part.first_row for document in batch.documents)


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
        flat = part.view.input_ids_BT.flatten()
        for n, place in enumerate(part.view.rows_N.tolist()):
            assert flat[place + 1] == part.view.labels_N[n]
            row, column = divmod(place, batch.tokens_BT.shape[1])
            d = next(d for d in batch.documents if d.row == row + part.first_row and d.start <= column < d.stop)
            hidden = scripted_hidden(batch.tokens_BT[d.row, d.start : column + 1])[-1]
            truth = torch.log_softmax(torch.from_numpy(scripted_head(V) @ hidden), 0)[part.view.labels_N[n]]
            assert float(part.teacher.next_logprob_N[n]) == pytest.approx(float(truth), abs=1e-4)
            assert batch.documents.index(d) == documents_before(batch, part) + int(part.documents_N[n])
            assert batch.source_names[int(part.sources_N[n])] == batch.source_names[batch.source_ids_BT[d.row, column]]
            seen += 1
    assert seen == int(batch.loss_mask_BT.sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_is_the_teacher_loses_nothing_only_where_it_reads_its_own_rows(temperature: float) -> None:
    batch = BATCHES["plain"]
    targets = targets_of(batch)
    head_VD = torch.from_numpy(scripted_head(V).copy())
    term = token_term("kl", "top_k_kl", 1.0, temperature=temperature)
    ahead_BTD = teacher_hidden(batch)  # row t predicts token t+1
    own_BTD = torch.roll(ahead_BTD, 1, dims=1)  # row t predicts token t, as an unshifted diffusion student

    def loss(hidden_BTD: torch.Tensor, reader: Reader) -> float:
        (part,) = micro_batches(batch, targets, reader=reader)
        rows_ND = hidden_BTD.flatten(0, 1)[part.view.rows_N]
        return float(head_loss(rows_ND, head_VD, part.view.labels_N, part.teacher, [term]).total) / len(
            part.view.labels_N
        )

    shifted, in_place = CausalReader(), InPlaceReader()
    assert loss(ahead_BTD, shifted) == pytest.approx(0, abs=1e-5)
    assert loss(own_BTD, in_place) == pytest.approx(0, abs=1e-5)
    assert loss(ahead_BTD, in_place) > 0.5 and loss(own_BTD, shifted) > 0.5


def test_in_place_the_label_is_the_token_of_the_row_itself() -> None:
    batch = BATCHES["plain"]
    (part,) = micro_batches(batch, None, reader=InPlaceReader())
    assert torch.equal(part.view.input_ids_BT.flatten()[part.view.rows_N], part.view.labels_N)


def test_rows_that_do_not_count_are_not_asked_for() -> None:
    batch = BATCHES["masked"]
    asked = [counted_rows(batch, d) for d in batch.documents]
    assert asked == [(0, 9), (0, 4), (0, 2), None, (0, 7)]
    first = batch_of([6], masks={(0, 0): [False, False, False, True, True, False]})
    assert counted_rows(first, first.documents[0]) == (2, 4)


def test_a_teacher_is_asked_the_same_about_a_document_packed_alone_and_padded() -> None:
    together = BATCHES["masked"]
    asked = {
        document.key: query
        for document, query in zip(together.documents, queries_of(together, ASK), strict=True)
        if query is not None
    }
    for document in together.documents:
        tokens_T = together.tokens_BT[document.row, document.start : document.stop]
        counts = MASKS.get(tuple(int(part) for part in document.key.split(":")[1:]))
        placed = Placed(0, document.key, tokens_T, None if counts is None else np.array(counts))
        for seq_len in (len(tokens_T), 24):
            alone = build_batch(0, [[placed]], seq_len, 0, ("x", "y"))
            (found,) = queries_of(alone, ASK)
            expected = asked.get(document.key)
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                np.testing.assert_array_equal(found.tokens_T, expected.tokens_T)
                assert (found.rows, found.spec) == (expected.rows, expected.spec)


def test_documents_of_one_token_need_no_teacher() -> None:
    batch = BATCHES["lonely"]
    assert [counted_rows(batch, d) for d in batch.documents] == [None] * 4
    assert micro_batches(batch, targets_of(batch)) == ()


def test_micro_batches_without_a_label_are_left_out() -> None:
    batch = batch_of([1, 1], [5, 3], [1])
    parts = micro_batches(batch, targets_of(batch), rows=1)
    assert [part.first_row for part in parts] == [1]


SAMPLED = TargetSpec(("top_k", "sampled", "hidden"), 16, num_samples=9, seed=3, hidden_dtype="float16")


def columns_by_label(batch: Batch, targets: BatchTargets) -> list[tuple[list[int], list[int], np.ndarray]]:
    """Of every label in order: the ids drawn, how often, and the hidden state, read from the answers one by one."""
    out = []
    for d, answer in zip(batch.documents, targets.documents, strict=True):
        for t in np.flatnonzero(batch.loss_mask_BT[d.row, d.start : d.stop]):
            assert answer is not None and answer.sampled_offsets is not None and answer.hidden is not None
            assert answer.sampled_ids is not None and answer.sampled_counts is not None
            a, b = answer.sampled_offsets[t - answer.start : t - answer.start + 2]
            out.append((answer.sampled_ids[a:b].tolist(), answer.sampled_counts[a:b].tolist(),
                        answer.hidden[t - answer.start]))  # fmt: skip
    return out


@pytest.mark.parametrize("name", ["plain", "masked"])
@pytest.mark.parametrize("rows", [None, 1])
def test_samples_and_hidden_states_stand_beside_their_labels(name: str, rows: int | None) -> None:
    batch = BATCHES[name]
    targets = targets_of(batch, SAMPLED)
    expected = iter(columns_by_label(batch, targets))
    for part in micro_batches(batch, targets, rows=rows):
        teacher = part.teacher
        assert teacher is not None and teacher.sampled_offsets is not None and teacher.teacher_hidden_NE is not None
        assert teacher.sampled_ids is not None and teacher.sampled_counts is not None
        offsets = teacher.sampled_offsets.tolist()
        for n, (ids, counts, hidden) in zip(range(len(part.view.labels_N)), expected, strict=False):
            drawn = slice(offsets[n], offsets[n + 1])
            assert teacher.sampled_ids[drawn].tolist() == ids and sum(counts) == 9
            assert teacher.sampled_counts[drawn].tolist() == counts
            assert np.array_equal(teacher.teacher_hidden_NE[n].numpy(), hidden)
    assert next(expected, None) is None


def test_hidden_states_are_read_in_each_of_their_dtypes() -> None:
    numbers_RD = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    bf16_RD = torch.from_numpy(numbers_RD).bfloat16()
    bits_RD = bf16_RD.view(torch.uint16).numpy()
    assert np.array_equal(hidden_numbers(bits_RD, None), bf16_RD.float().numpy())
    scale_R = np.abs(numbers_RD).max(1) / 127
    int8_RD = np.round(numbers_RD / scale_R[:, None]).astype(np.int8)
    assert np.abs(hidden_numbers(int8_RD, scale_R) - numbers_RD).max() <= scale_R.max() / 2 + 1e-6


def test_the_ids_of_the_student_go_to_the_documents_that_they_belong_to() -> None:
    batch = BATCHES["masked"]
    ids_NG = np.arange(int(batch.loss_mask_BT.sum()))[:, None] + np.array([[100, 1000]])
    asked = queries_at(batch, ids_NG)
    labels = 0
    for d, query in zip(batch.documents, asked, strict=True):
        assert (None if query is None else query.rows) == counted_rows(batch, d)
        if query is None:
            continue
        (start, stop), ids_RG = query.rows, query.gather_ids_RG
        assert ids_RG is not None and len(ids_RG) == stop - start
        counted_R = batch.loss_mask_BT[d.row, d.start + start : d.start + stop]
        assert ids_RG[counted_R][:, 0].tolist() == list(range(labels + 100, labels + 100 + counted_R.sum()))
        labels += int(counted_R.sum())
    assert labels == len(ids_NG)


@pytest.mark.parametrize("soft_cap", [None, 7.0])
def test_the_teachers_head_makes_the_logits_that_the_wire_defines(soft_cap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    weight_VD, bias_V, hidden_ND = (torch.randn(*shape, generator=generator) for shape in ((20, 6), (20,), (4, 6)))
    file = {"weight": weight_VD, "bias": bias_V, "scale": torch.tensor(0.5)}
    product_NV = hidden_ND @ weight_VD.T + bias_V
    if soft_cap is not None:
        file["soft_cap"] = torch.tensor(soft_cap)
        product_NV = soft_cap * torch.tanh(product_NV / soft_cap)
    head = read_head(save(file), torch.device("cpu"))
    logits_NV = head.scale * (hidden_ND @ head.weight_VD.T + head.bias_V)
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    assert torch.allclose(logits_NV, 0.5 * product_NV, atol=1e-5)


def test_a_file_that_is_no_head_is_refused() -> None:
    with pytest.raises(InvalidTargetsError, match="not a safetensors"):
        read_head(b"nonsense", torch.device("cpu"))
    with pytest.raises(InvalidTargetsError, match=r"expected weight \[V, D\]"):
        read_head(save({"weight": torch.zeros(3), "scale": torch.tensor(1.0)}), torch.device("cpu"))
    with pytest.raises(InvalidTargetsError, match="biases"):
        read_head(
            save({"weight": torch.zeros(3, 2), "bias": torch.zeros(2), "scale": torch.tensor(1.0)}), torch.device("cpu")
        )
