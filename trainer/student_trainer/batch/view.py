"""How a student reads some rows of a batch: its inputs, its attention, and which of its rows learns which label.

Made by a student's `Reader`, matched with the teacher's rows by `align`. A view may have any width and rows of its own:
`counted_N` keeps label and teacher row together, whatever the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from student_trainer.batch.batch import Batch
from student_trainer.batch.tensors import to_device

# What a view is for: its random parts are the same at every evaluation.
TRAINING, EVALUATION = range(2)


@dataclass(frozen=True)
class ViewSeed:
    """What the random parts of views depend on, besides the batch. So they do not depend on the split into micro
    batches, on ranks, workers, prefetching or a resume: a row is read alike on any rank and in any split.
    """

    seed: int
    purpose: int = TRAINING

    def generator(self, batch: Batch, row: int) -> np.random.Generator:
        """The generator for row `row` of `batch`, which may be part of a larger batch; the same at every call."""
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
    """Attention by an explicit order. A query q sees a key k of its document if either holds:

        shown_at[k] <= sees_to[q]           k comes early enough in the order
        group[k] == group[q], not negative  members of a group see each other whatever the order

    All int32 [B, T]. `document_ids_BT`: -1 is padding, which needs to see some padding. `shown_at_BT`: NEVER if a
    position is seen by its own group only, as the noisy tokens of a block are. `groups_BT`: -1 for none. `places_BT`:
    positions in the document; a window of W hides keys W or more places back.

    A row of a block-diffusion student is its noisy half beside the clean one. With b the block of a token, the clean
    half has shown_at = sees_to = b and no group; a noisy token is seen by its own block only, group = b, and sees the
    clean blocks before it, sees_to = b - 1. With a causal clean half, shown_at = sees_to = the place of a clean token,
    and for a noisy one sees_to = the last place before its block.
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
    """The input of one forward pass, and what is learnt from it. T is the view's own width.

    `rows_N`: the student's row for each label, in the flattened [B * T]. `counted_N`: which of the batch's counted
    positions, by row and then by column, each label is; positions may be missing or repeated. It stays on the CPU,
    where positions are told apart.
    `clean_rows_N`: for each label, the row that predicts it from left to right, in a clean half beside the noisy one;
    None if there is no such half, or if its rows see more than that.
    `clean_blocks_BT`: the block of each position of a clean half, -1 elsewhere; on the CPU.
    `weights_N`: the weight of each label in the loss; None: 1.
    `chosen_from`: the number of positions that the labels were chosen from, if the loss is divided by that (labels
    weighted by 1 / their probability); None: the loss is divided by the number of labels.
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
        """What this view adds to the divisor of the whole batch's loss."""
        return len(self.labels_N) if self.chosen_from is None else self.chosen_from

    def to(self, device: torch.device) -> View:
        return to_device(self, device, attention=self.attention.to(device), counted_N=self.counted_N,
            clean_blocks_BT=self.clean_blocks_BT,
        )  # fmt: skip


class Reader(Protocol):
    """How an architecture reads batches; a student has a reader, and is one itself."""

    @property
    def autoregressive(self) -> bool:
        """Whether row t sees only tokens up to t and predicts t+1: such a student can write from left to right."""
        ...

    def views(self, batch: Batch, seed: ViewSeed) -> tuple[View, ...]:
        """The views of the batch's rows, on the CPU: as many for every batch, since all ranks must make as many passes.

        A pure function of the rows and the seed: a row is read the same in whichever part of a batch it comes.
        """
        ...
