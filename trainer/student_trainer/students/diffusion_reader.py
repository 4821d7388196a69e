"""How a block-diffusion student reads a batch: noisy tokens beside clean ones, which are masked, and who attends to
whom. Made in `diffusion`.

One row of twice the width (Fast-dLLM v2, arXiv 2509.26328; SDAR, arXiv 2510.06303): a noisy token sees its own block
and the clean tokens before it. Tokens are masked at random, block by block, only where the data has tokens to learn.
Blocks are counted from the start of each document.

In a text that the student wrote (OPDLM, arXiv 2606.06712) every block is shown in one state of its own trajectory,
drawn uniformly, and the loss is on all tokens that are still masked in that state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from student_trainer.batch.batch import Batch
from student_trainer.batch.tensors import own_tensor
from student_trainer.batch.view import EVALUATION, NEVER, TRAINING, OrderedDocuments, View, ViewSeed
from student_trainer.settings.student import GrowthSettings
from student_trainer.students.diffusion_record import DiffusionRecord

# The least probability with which a token is masked: p = (1 - LEAST) t + LEAST, as in Fast-dLLM v2.
LEAST = 1e-3


@dataclass(frozen=True)
class DiffusionReader:
    """How a block-diffusion student reads. `masks`, `complementary` and `by_share`: see `settings.student`; the last
    is loss_weights=1/t, which weights a label by 1 / the share of its block that was to be masked.
    """

    record: DiffusionRecord
    masks: str = "uniform"
    complementary: bool = True
    by_share: bool = False
    growth: GrowthSettings | None = None
    autoregressive: bool = False
    threshold: float = 0.9  # probability above which tokens are written together: see `rollouts.block_decoding`

    def views(self, batch: Batch, seed: ViewSeed) -> tuple[View, ...]:
        """One view, or two, of which the second masks what the first showed; for a text that the student wrote, one
        view with a state of its trajectory per block. Held-out text is masked alike for all students: uniformly, in two
        views. Blocks that grow have their final size in an evaluation and in text that the student wrote.
        ValueError for a text that contains the mask token.
        """
        if seed.purpose == EVALUATION and (self.masks, self.complementary, self.by_share) != ("uniform", True, False):
            return replace(self, masks="uniform", complementary=True, by_share=False).views(batch, seed)
        self._refuse_masked_text(batch)
        size = self.record.block_size
        if self.growth is not None and seed.purpose == TRAINING and batch.kind == "data":
            now = replace(self.record, block_size=self.growth.at(batch.number, size))
            return replace(self, record=now, growth=None).views(batch, seed)
        maskable_BT = np.zeros(batch.tokens_BT.shape, bool)
        # A counted position at column t predicts token t + 1, which is the one to mask.
        maskable_BT[:, 1:] = batch.loss_mask_BT[:, :-1]
        if batch.written_at_BT is not None:
            masked_BT = np.zeros(maskable_BT.shape, bool)
            for row, (written_at_T, maskable_T) in enumerate(zip(batch.written_at_BT, maskable_BT, strict=True)):
                chance_T = seed.generator(batch, row).random(len(maskable_T))
                masked_BT[row] = left_to_write(written_at_T, maskable_T, self._blocks(batch, row), chance_T)
            return (self._view(batch, masked_BT, None),)
        masked_BT, share_BT = self._noise(batch, maskable_BT, seed)
        views = (self._view(batch, masked_BT, share_BT),)
        return (*views, self._view(batch, maskable_BT & ~masked_BT, 1.0 - share_BT)) if self.complementary else views

    def _noise(self, batch: Batch, maskable_BT: np.ndarray, seed: ViewSeed) -> tuple[np.ndarray, np.ndarray]:
        """[B, T] twice: which tokens are masked, and for each the share of its block that was to be masked."""
        masked_BT, share_BT = np.zeros(maskable_BT.shape, bool), np.ones(maskable_BT.shape)
        for row, maskable_T in enumerate(maskable_BT):
            # As many draws for every row, whatever it holds; a block's own is the one at its first place.
            noise_T, chance_T = seed.generator(batch, row).random((2, len(maskable_T)))
            place_T, ordinal_T = batch.position_ids_BT[row], self._blocks(batch, row)
            # One t per block: `ordinal_T` numbers the blocks, and each place looks up the draw of its block.
            noise_T = noise_T[np.r_[True, np.diff(ordinal_T) != 0]][ordinal_T]
            if self.masks == "uniform":
                # Each token is masked with probability p = (1 - eps) t + eps.
                share_BT[row] = (1.0 - LEAST) * noise_T + LEAST
                masked_BT[row] = maskable_T & (chance_T < share_BT[row])
                continue
            within_M, place_M = np.flatnonzero(maskable_T), place_T[maskable_T] % self.record.block_size
            # Suffix masks take the last places of a block: their key is the place itself.
            key_M = place_M.astype(float)
            if self.masks == "position_dependent":
                key_M = self._late_places(place_M, noise_T[within_M], chance_T[within_M])
            chosen_M, share_M = _largest(key_M, ordinal_T[within_M], noise_T[within_M], self.masks == "suffix")
            masked_BT[row, within_M], share_BT[row, within_M] = chosen_M, share_M
        return masked_BT, share_BT

    def _blocks(self, batch: Batch, row: int) -> np.ndarray:
        """[T]: the block of each place of the row, numbered from 0 over all its documents."""
        # A new block begins at every multiple of the size within a document, and at every document.
        block_T, document_T = batch.position_ids_BT[row] // self.record.block_size, batch.document_ids_BT[row]
        return np.cumsum(np.r_[False, (np.diff(block_T) != 0) | (np.diff(document_T) != 0)])

    def _late_places(self, place_M: np.ndarray, noise_M: np.ndarray, chance_M: np.ndarray) -> np.ndarray:
        """Keys of which the k largest are a draw without replacement, with weight exp(beta (1 - t) i) at place i of the
        block (Gumbel); beta doubles the weight over a tenth of a block (Efficient-DLM, arXiv 2512.14067).
        """
        # exp(beta i) doubles every tenth of a block; at t = 1 all places have the same weight, at t = 0 late ones most.
        beta = math.log(2.0) / (0.1 * self.record.block_size)
        # Gumbel noise: log w + G is largest at i with probability w_i / sum w; the k largest: without replacement.
        gumbel_M = -np.log(-np.log(np.clip(chance_M, 1e-12, 1.0 - 1e-12)))
        return beta * (1.0 - noise_M) * place_M + gumbel_M

    def _view(self, batch: Batch, masked_BT: np.ndarray, share_BT: np.ndarray | None) -> View:
        weighed = share_BT if self.by_share else None
        row_C, column_C = batch.counted()
        counted_N = np.flatnonzero(masked_BT[row_C, column_C + 1])
        row_N, column_N = row_C[counted_N], column_C[counted_N]
        # Left half noisy, right half clean: the noisy rows are those that predict.
        noisy_BT = np.where(masked_BT, self.record.mask_token_id, batch.tokens_BT)
        width = 2 * batch.tokens_BT.shape[1]
        # In the noisy half, token column + 1 is predicted by its own row, or by the one before it.
        predicts_N = column_N + (0 if self.record.family == "token_shift" else 1)
        block_BT = batch.position_ids_BT // self.record.block_size
        reads_ahead = self.record.clean_half == "causal" or self.record.block_size == 1
        return View(
            input_ids_BT=own_tensor(np.concatenate([noisy_BT, batch.tokens_BT], 1), torch.int64),
            position_ids_BT=own_tensor(np.concatenate([batch.position_ids_BT] * 2, 1), torch.int64),
            attention=self._attention(batch),
            rows_N=own_tensor(row_N * width + predicts_N, torch.int64),
            labels_N=own_tensor(batch.tokens_BT[row_N, column_N + 1], torch.int64),
            counted_N=own_tensor(counted_N, torch.int64),
            clean_rows_N=own_tensor(row_N * width + width // 2 + column_N, torch.int64) if reads_ahead else None,
            clean_blocks_BT=own_tensor(np.concatenate([np.full_like(block_BT, -1), block_BT], 1), torch.int32),
            weights_N=None if weighed is None else own_tensor(1.0 / weighed[row_N, column_N + 1], torch.float32),
            chosen_from=None if weighed is None else len(row_C),
        )

    def _attention(self, batch: Batch) -> OrderedDocuments:
        """Noisy beside clean, as `OrderedDocuments` describes it."""
        places_BT, size = batch.position_ids_BT, self.record.block_size
        blocks_BT = places_BT // size
        if self.record.clean_half == "causal":
            # Order by places: a noisy token sees clean ones up to the last place before its block.
            clean_BT, before_BT = places_BT, blocks_BT * size - 1
        else:
            # Order by blocks: clean blocks up to the one before, and a clean token its own block.
            clean_BT, before_BT = blocks_BT, blocks_BT - 1

        def halves(noisy_BT: np.ndarray, clean_BT: np.ndarray) -> torch.Tensor:
            return own_tensor(np.concatenate([noisy_BT, clean_BT], 1), torch.int32)

        return OrderedDocuments(
            document_ids_BT=halves(batch.document_ids_BT, batch.document_ids_BT),
            shown_at_BT=halves(np.full_like(blocks_BT, NEVER), clean_BT),
            sees_to_BT=halves(before_BT, clean_BT),
            groups_BT=halves(blocks_BT, np.full_like(blocks_BT, -1)),
            places_BT=halves(places_BT, places_BT),
        )

    def _refuse_masked_text(self, batch: Batch) -> None:
        mask = self.record.mask_token_id
        for row in np.flatnonzero(((batch.tokens_BT == mask) & (batch.document_ids_BT >= 0)).any(1)):
            where = np.flatnonzero((batch.tokens_BT[row] == mask) & (batch.document_ids_BT[row] >= 0))[0]
            key = next(d.key for d in batch.documents if d.row == row and d.start <= where < d.stop)
            raise ValueError(
                f"document {key} holds token {mask}, which is the student's mask token: it would look like a masked "
                "token; remove it from the data, or set student.diffusion.mask_token_id to a row that no text uses"
            )


def _largest(
    key_M: np.ndarray, ordinal_M: np.ndarray, noise_M: np.ndarray, up_to_all: bool
) -> tuple[np.ndarray, np.ndarray]:
    """[M] twice: whether each is among the k largest keys of its block's n tokens, and k / n. `noise_M`: t of its
    block. k is at least 1: with `up_to_all` uniform over 1 to n, else t n rounded.
    """
    # Sorted by block, then by key: the index in that order minus that of the block's first is the rank.
    order_M = np.lexsort((key_M, ordinal_M))
    rank_M = np.empty(len(key_M), int)
    sorted_M = ordinal_M[order_M]
    rank_M[order_M] = np.arange(len(key_M)) - np.searchsorted(sorted_M, sorted_M)
    # How many maskable tokens the block has.
    n_M = np.searchsorted(sorted_M, ordinal_M, side="right") - np.searchsorted(sorted_M, ordinal_M)
    k_M = np.floor(noise_M * n_M).astype(int) + 1 if up_to_all else np.rint(noise_M * n_M).astype(int)
    k_M = np.clip(k_M, 1, n_M)
    return rank_M >= n_M - k_M, k_M / np.maximum(n_M, 1)


def left_to_write(
    written_at_T: np.ndarray, maskable_T: np.ndarray, blocks_T: np.ndarray, chance_T: np.ndarray
) -> np.ndarray:
    """[T] bool: which tokens of a row are masked in the state drawn for their block.

    `written_at_T`: at which write of its sequence a token was written, 0 for given ones. `blocks_T`: the number of each
    place's block. `chance_T`: uniform numbers, of which the one at a block's first place draws its state. In the state
    before a write, the tokens of that write and of later ones are masked; a block has one state per write that it took.
    """
    masked_T = np.zeros(len(written_at_T), bool)
    written_T = maskable_T & (written_at_T > 0)
    for block in np.unique(blocks_T[written_T]):
        places = np.flatnonzero(blocks_T == block)
        writes = np.unique(written_at_T[places][written_T[places]])
        # A state is the block before one of its writes: that write and all later ones are still to be made.
        before = writes[int(chance_T[places[0]] * len(writes))]
        masked_T[places] = written_T[places] & (written_at_T[places] >= before)
    return masked_T
