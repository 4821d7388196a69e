"""Views cut and joined with what belongs to their labels: readers that leave labels out, and name them twice."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.batch.tensors import moved, to_device
from student_trainer.batch.view import CausalDocuments, View, ViewSeed
from student_trainer.losses.kinds import token_term
from student_trainer.losses.metrics import LossSums
from student_trainer.losses.values import HeadLoss
from student_trainer.students.causal import CausalReader
from student_trainer.targets.queries import queries_of
from student_trainer.targets.student_support import ids_by_position, slots_of
from teacher_proto.requests import TargetSpec
from tests.trainer_run import ScriptedTargets

V = 64
SPEC = TargetSpec(("top_k", "sampled"), 16, num_samples=5, seed=1)
SEED = ViewSeed(0)


def batch_of(*rows: list[int]) -> Batch:
    draw = np.random.default_rng(3)
    placed = [
        [Placed(d % 2, f"s:{r}:{d}", draw.integers(0, V, n, dtype=np.int32), None) for d, n in enumerate(lengths)]
        for r, lengths in enumerate(rows)
    ]
    return build_batch(0, placed, 12, 0, ("x", "y"))


@dataclass(frozen=True)
class Picking(CausalReader):
    """The labels at the given places among a part's counted positions, modulo their number."""

    places: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None
    chosen_from: int | None = None

    def views(self, batch: Batch, seed: ViewSeed) -> tuple[View, ...]:
        (view,) = super().views(batch, seed)
        picked_N = torch.tensor([place % len(view.labels_N) for place in self.places if len(view.labels_N)]).long()
        weights_N = None if self.weights is None else torch.tensor(self.weights)[: len(picked_N)]
        return (
            replace(
                view, rows_N=view.rows_N[picked_N], labels_N=view.labels_N[picked_N], counted_N=picked_N,
                weights_N=weights_N, chosen_from=self.chosen_from,
            ),
        )  # fmt: skip


BATCH = batch_of([5, 4, 2], [12], [1, 3])


def targets_of(batch: Batch) -> BatchTargets:
    return asyncio.run(ScriptedTargets({"vocab_size": V}).fetch(batch, queries_of(batch, SPEC)))


@pytest.mark.parametrize("places", [(0, 3, 8), (8, 3, 0), (4, 4, 1, 4), (19,)])
def test_what_belongs_to_a_label_follows_it_in_any_order_and_twice(places: tuple[int, ...]) -> None:
    targets = targets_of(BATCH)
    (whole,) = cut(BATCH, targets, CausalReader(), SEED)
    (picked,) = cut(BATCH, targets, Picking(places=places), SEED)
    chosen_N = torch.tensor([place % len(whole.view.labels_N) for place in places])
    assert torch.equal(picked.view.labels_N, whole.view.labels_N[chosen_N])
    assert torch.equal(picked.sources_N, whole.sources_N[chosen_N])
    assert torch.equal(picked.documents_N, whole.documents_N[chosen_N])
    ours, theirs = picked.teacher, whole.teacher
    assert ours is not None and theirs is not None
    for name in ("ids_NK", "logprobs_NK", "next_logprob_N"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)[chosen_N]), name
    assert drawn_by(ours) == [drawn_by(theirs)[place] for place in chosen_N.tolist()]


def drawn_by(rows: TeacherRows) -> list[dict[int, int]]:
    """How often each id was drawn, row by row."""
    ids_NU, counts_NU = rows.sampled_padded()
    pairs = (zip(ids, counts, strict=True) for ids, counts in zip(ids_NU.tolist(), counts_NU.tolist(), strict=True))
    return [{token: count for token, count in row if count} for row in pairs]


def test_a_view_is_left_out_where_it_adds_nothing_to_the_count() -> None:
    def rows(reader: Picking, keep_empty: bool = False) -> list[int]:
        return [part.first_row for part in cut(BATCH, None, reader, SEED, rows=1, keep_empty=keep_empty)]

    assert rows(Picking(places=(0,))) == [0, 1, 2]
    assert rows(Picking()) == [] and rows(Picking(), keep_empty=True) == [0, 1, 2]
    assert rows(Picking(chosen_from=3)) == [0, 1, 2], "without a label, but others might have been chosen"


def test_metrics_are_weighted_means_and_the_loss_is_divided_by_the_count() -> None:
    terms = (token_term("ce", "cross_entropy", 0.5),)
    sums = LossSums(terms, BATCH.source_names)
    total, count, per_source = 0.0, 0, {"x": [0.0, 0.0], "y": [0.0, 0.0]}
    for rows in (slice(0, 1), slice(1, 3)):
        reader = Picking(places=(0, 5, 2), weights=(4.0, 0.5, 2.0), chosen_from=6)
        for micro in cut(BATCH.rows(rows.start, rows.stop), None, reader, SEED):
            value_N = torch.tensor([1.0, 3.0, 7.0])
            counted_N = torch.ones(3, dtype=torch.bool)
            sums.add(HeadLoss(torch.zeros(()), {"ce": value_N}, {"ce": counted_N}), micro)
            total, count = total + 4.0 + 1.5 + 14.0, count + 6
            for n, (value, weight) in enumerate(zip((1.0, 3.0, 7.0), (4.0, 0.5, 2.0), strict=True)):
                of = per_source[BATCH.source_names[int(micro.sources_N[n])]]
                of[0], of[1] = of[0] + weight * value, of[1] + weight
    metrics = sums.metrics()
    assert metrics.tokens == count == 12
    assert metrics.loss == pytest.approx(0.5 * total / count)
    assert metrics.terms["ce"] == pytest.approx(total / 13.0)
    for source, (value, weight) in per_source.items():
        assert metrics.by_source[source]["ce"] == pytest.approx(value / weight)
    assert sum(of["tokens"] for of in metrics.by_source.values()) == 6, "of labels, whatever they weigh"


def test_a_students_ids_are_asked_for_at_every_label_of_a_position() -> None:
    """A view may read a position in two ways; both labels' ids go into the one question about it, and come back."""
    (micro,) = cut(BATCH, targets_of(BATCH), Picking(places=(4, 1, 4)), SEED)
    ids_NG = torch.tensor([[40, 41], [10, 11], [42, 43]])
    ids_CG = ids_by_position(micro, ids_NG, BATCH)
    assert ids_CG.shape == (int(BATCH.loss_mask_BT.sum()), 4)
    assert ids_CG[4].tolist() == [40, 41, 42, 43] and ids_CG[1].tolist() == [10, 11, 0, 0]
    assert not ids_CG[[0, 2, 3, *range(5, len(ids_CG))]].any()
    assert np.array_equal(ids_CG.reshape(len(ids_CG), 2, 2)[slots_of(micro)], ids_NG.numpy())


class Elsewhere:
    """A tensor that says what is done to it; a GPU's memory can't be had here."""

    def __init__(self, device: str, log: list[Any]):
        self.device, self._log = torch.device(device), log

    def pin_memory(self) -> Elsewhere:
        self._log.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool) -> Elsewhere:
        self._log.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [("cpu", "cuda", ["pinned", ("cuda", True)]), ("cuda", "cpu", [("cpu", True)]), ("cpu", "meta", [("meta", True)])],
)
def test_a_copy_to_a_gpu_is_made_of_pinned_memory(here: str, there: str, expected: list[Any]) -> None:
    log: list[Any] = []
    moved(Elsewhere(here, log), torch.device(there))  # type: ignore[arg-type]
    assert log == expected


def test_what_is_on_its_device_stays_as_it_is() -> None:
    attention = CausalDocuments(torch.zeros(1, 4, dtype=torch.int32))
    assert to_device(attention, "cpu") is attention
    assert to_device(attention, "meta").document_ids_BT.is_meta


def test_a_micro_batch_moves_whole_but_for_what_is_told_apart_on_the_cpu() -> None:
    (micro,) = cut(BATCH, targets_of(BATCH), Picking(places=(4, 1), weights=(1.0, 2.0)), SEED)
    there = micro.to(torch.device("meta"))
    left = [
        name for name, tensor in vars(there.view).items() if isinstance(tensor, torch.Tensor) and not tensor.is_meta
    ]
    assert left == ["counted_N"]
    assert there.view.attention.document_ids_BT.is_meta and there.sources_N.is_meta and there.documents_N.is_meta
    assert there.teacher is not None and there.teacher.ids_NK is not None and there.teacher.ids_NK.is_meta
