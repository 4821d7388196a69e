"""A toy block-diffusion student, plugged in as any architecture would be: by a reader, and a line in a dict.

Each batch is read twice, in views of twice its width: noisy tokens beside clean ones, the second view masking what the
first one showed. It stands in for what an architecture of `students/` would hold, so that tests show that all else
takes such a student as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from student_trainer.batch.batch import Batch
from student_trainer.batch.tensors import own_tensor
from student_trainer.batch.view import NEVER, OrderedDocuments, View, ViewSeed
from student_trainer.settings import StudentSettings
from student_trainer.students import load
from student_trainer.students.causal import wrap_decoder
from student_trainer.students.student import Student
from tests.models import VOCAB_SIZE

MASK = VOCAB_SIZE - 1  # an id that no text holds
BLOCK = 4
LEAST_NOISE = 0.1


@dataclass(frozen=True)
class BlockDiffusionReader:
    """`shift`: token l is predicted by the row of token l - 1, else by its own. `weighted`: a label weighs 1 / the
    chance that it was masked, and the loss is divided by all positions that might have been.
    """

    shift: bool = False
    weighted: bool = True
    block: int = BLOCK
    autoregressive: bool = False

    def views(self, batch: Batch, seed: ViewSeed) -> tuple[View, ...]:
        chance_BT, first_BT = self._noise(batch, seed)
        return tuple(
            self._view(batch, masked_BT, chances_BT)
            for masked_BT, chances_BT in ((first_BT, chance_BT), (~first_BT, 1.0 - chance_BT))
        )

    def _noise(self, batch: Batch, seed: ViewSeed) -> tuple[np.ndarray, np.ndarray]:
        """The chance of each position to be masked in the first view, alike within a block, and whether it is."""
        chance_BT, masked_BT = np.zeros(batch.tokens_BT.shape), np.zeros(batch.tokens_BT.shape, bool)
        for row in range(len(batch.tokens_BT)):
            draw = seed.generator(batch, row)
            by_place_T = draw.uniform(LEAST_NOISE, 1.0 - LEAST_NOISE, batch.tokens_BT.shape[1])
            blocks_T = batch.position_ids_BT[row] // self.block
            starts_T = np.r_[True, (np.diff(blocks_T) != 0) | (np.diff(batch.document_ids_BT[row]) != 0)]
            chance_BT[row] = by_place_T[np.maximum.accumulate(np.where(starts_T, np.arange(len(starts_T)), 0))]
            masked_BT[row] = draw.random(len(starts_T)) < chance_BT[row]
        return chance_BT, masked_BT

    def _view(self, batch: Batch, masked_BT: np.ndarray, chance_BT: np.ndarray) -> View:
        row_C, column_C = batch.counted()
        # The counted position at column t is the prediction of token t + 1: that is the one to be masked.
        counted_N = np.flatnonzero(masked_BT[row_C, column_C + 1])
        row_N, column_N = row_C[counted_N], column_C[counted_N]
        noisy_BT = batch.tokens_BT.copy()
        noisy_BT[row_N, column_N + 1] = MASK
        width = 2 * batch.tokens_BT.shape[1]
        weights_N = 1.0 / chance_BT[row_N, column_N + 1]
        return View(
            input_ids_BT=own_tensor(np.concatenate([noisy_BT, batch.tokens_BT], 1), torch.int64),
            position_ids_BT=own_tensor(np.concatenate([batch.position_ids_BT] * 2, 1), torch.int64),
            attention=noisy_beside_clean(batch.document_ids_BT, batch.position_ids_BT, self.block),
            rows_N=own_tensor(row_N * width + column_N + (0 if self.shift else 1), torch.int64),
            labels_N=own_tensor(batch.tokens_BT[row_N, column_N + 1], torch.int64),
            counted_N=own_tensor(counted_N, torch.int64),
            weights_N=own_tensor(weights_N, torch.float32) if self.weighted else None,
            chosen_from=len(row_C) if self.weighted else None,
        )


def noisy_beside_clean(document_ids_BT: np.ndarray, position_ids_BT: np.ndarray, block: int) -> OrderedDocuments:
    blocks_BT = position_ids_BT // block
    never_BT, none_BT = np.full_like(blocks_BT, NEVER), np.full_like(blocks_BT, -1)

    def halves(noisy_BT: np.ndarray, clean_BT: np.ndarray) -> torch.Tensor:
        return own_tensor(np.concatenate([noisy_BT, clean_BT], 1), torch.int32)

    return OrderedDocuments(
        document_ids_BT=halves(document_ids_BT, document_ids_BT),
        shown_at_BT=halves(never_BT, blocks_BT),
        sees_to_BT=halves(blocks_BT - 1, blocks_BT),
        groups_BT=halves(blocks_BT, none_BT),
        places_BT=halves(position_ids_BT, position_ids_BT),
    )


def in_place(model: Any, attention: str, settings: StudentSettings) -> Student:
    return wrap_decoder(model, attention, settings, BlockDiffusionReader())


def shifted(model: Any, attention: str, settings: StudentSettings) -> Student:
    return wrap_decoder(model, attention, settings, BlockDiffusionReader(shift=True, weighted=False))


TOYS = {"toy_in_place": in_place, "toy_shifted": shifted}


def plug_in(rank: int = 0) -> None:
    """What a line of `load` would do, in a process of its own."""
    load.ARCHITECTURES.update(TOYS)


def moved_by(student: Student, view: View) -> Iterator[torch.Tensor]:
    """For each input of the view's first row, by the model's own forward pass: which rows [T] compute something else
    when it is another id.
    """

    def hidden(ids_BT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return student.body(ids_BT, view.position_ids_BT, view.attention)[0]

    before_TD = hidden(view.input_ids_BT)
    for key in range(view.input_ids_BT.shape[1]):
        changed_BT = view.input_ids_BT.clone()
        changed_BT[0, key] = (changed_BT[0, key] + 1) % 60
        yield (hidden(changed_BT) - before_TD).abs().amax(-1) > 1e-6
