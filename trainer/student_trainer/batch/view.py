"""How a student reads some rows of a batch: what goes in, who sees whom, and which of its rows learns which label.

Made by a student's `Reader`, cut and joined with the teacher's rows by `micro_batch`. A view may be as wide as the
reader likes and use other rows than the batch: label and teacher row go together by `counted_N`, whatever the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from student_trainer.batch.batch import Batch
from student_trainer.batch.tensors import to_device

# What a view's random parts are for: those of the evaluation are the same at every evaluation.
TRAINING, EVALUATION = range(2)


@dataclass(frozen=True)
class ViewSeed:
    """What the random parts of views follow from, beside the batch. So they do not depend on the cut into micro
    batches, the ranks, workers, prefetching or a resume: two ranks, or two cuts, read a row alike.
    """

    seed: int
    purpose: int = TRAINING

    def generator(self, batch: Batch, row: int) -> np.random.Generator:
        """For row `row` of `batch`, which may be a part of a larger batch; the same at every call."""
        return np.random.default_rng([self.seed % 2**64, self.purpose, batch.number, batch.first_row + row])


@dataclass(frozen=True, eq=False)
class CausalDocuments:
    """Each position sees its own document up to itself. `document_ids_BT`: int32, -1 is padding."""

    document_ids_BT: Tensor

    @property
    def clean_documents_BT(self) -> Tensor:
        """The document of each position that holds a token of the batch as it is; -1 elsewhere."""
        return self.document_ids_BT

    def to(self, device: torch.device) -> CausalDocuments:
        return to_device(self, device)


NEVER = 2**31 - 1


@dataclass(frozen=True, eq=False)
class OrderedDocuments:
    """Who sees whom by an order of its own. A query q sees a key k of its document where either holds:

        shown_at[k] <= sees_to[q]           k is shown to all by then
        group[k] == group[q], not negative  they see each other whatever the order

    All int32 [B, T]. `document_ids_BT`: -1 is padding, which needs to see some padding. `shown_at_BT`: NEVER where only
    the own group sees a position, as the noisy tokens of a block. `groups_BT`: -1 for none. `places_BT`: positions in
    the document; a window of W hides keys W or more places back.

    A row of a block-diffusion student is its noisy half beside the clean one. With b the block of a token, the clean
    half has shown_at = sees_to = b and no group; the noisy half is shown to none but its own block, group = b, and sees
    what is clean before it, sees_to = b - 1. A causal clean half has shown_at = sees_to = the place itself.
    """

    document_ids_BT: Tensor
    shown_at_BT: Tensor
    sees_to_BT: Tensor
    groups_BT: Tensor
    places_BT: Tensor

    @property
    def clean_documents_BT(self) -> Tensor:
        """The document of each position that holds a token of the batch as it is; -1 elsewhere."""
        return self.document_ids_BT.masked_fill(self.shown_at_BT == NEVER, -1)

    def to(self, device: torch.device) -> OrderedDocuments:
        return to_device(self, device)


Attention = CausalDocuments | OrderedDocuments


@dataclass(frozen=True, eq=False)
class View:
    """What one forward pass reads, and what is learnt from it. T is the view's own width.

    `rows_N`: the student's row of each label in the flattened [B * T]. `counted_N`: which of the batch's counted
    positions, by row and then by position, each label is; it may leave some out, and name one twice. It stays on the
    CPU, where positions are told apart.
    `clean_rows_N`: the row of each label that predicts it from left to right, in a clean half beside the noisy one;
    None where there is no such half, or its rows see more than that.
    `clean_blocks_BT`: the block of each position of such a half, -1 elsewhere; on the CPU.
    `weights_N`: what each label weighs in the loss; None: 1.
    `chosen_from`: how many positions the labels were chosen from, where the loss is to be divided by those (labels that
    weigh 1 / their chance); None: the loss is divided by the number of labels.
    """

    input_ids_BT: Tensor  # int64
    position_ids_BT: Tensor  # int64
    attention: Attention
    rows_N: Tensor  # int64
    labels_N: Tensor  # int64
    counted_N: Tensor  # int64
    clean_rows_N: Tensor | None = None  # int64
    clean_blocks_BT: Tensor | None = None  # int32
    weights_N: Tensor | None = None  # float32
    chosen_from: int | None = None

    @property
    def count(self) -> int:
        """What this view adds to the number that the whole batch's loss is divided by."""
        return len(self.labels_N) if self.chosen_from is None else self.chosen_from

    def to(self, device: torch.device) -> View:
        return to_device(self, device, attention=self.attention.to(device), counted_N=self.counted_N,
            clean_blocks_BT=self.clean_blocks_BT,
        )  # fmt: skip


class Reader(Protocol):
    """An architecture's way to read; a student has one, and is one."""

    @property
    def autoregressive(self) -> bool:
        """Whether row t sees tokens up to t alone and predicts t+1: such a student can write from left to right."""
        ...

    def views(self, batch: Batch, seed: ViewSeed) -> tuple[View, ...]:
        """The views of the batch's rows, on the CPU: as many of every batch, since ranks make their passes together.

        A pure function of the rows and the seed: a row reads the same in whichever part of a batch it comes.
        """
        ...
