"""Makes a mask for SDPA or for flex attention from a view's attention: the only place that does. Called by `causal`.

A mask for SDPA is dense. One for flex attention is a rule, plus a list of the blocks of the attention map that it does
not hide entirely; the list is made from the least and the largest of the spec's integers in each block, so no dense
array is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student_trainer.batch.view import NEVER, Attention, CausalDocuments, OrderedDocuments

# Positions per side of a flex attention block.
BLOCK = 128

# (row, query, key) to whether the query sees the key, entry by entry; the indices broadcast.
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_mask(attention: Attention, window: int | None = None) -> Tensor:
    """Who sees whom, as booleans [B, 1, T, T]; with a window, no key that is `window` or more places back.

    Padding (document -1) sees padding, so that no row of the softmax is empty; nothing else sees it.
    """
    rows, length = attention.document_ids_BT.shape
    device = attention.document_ids_BT.device
    row_B11 = torch.arange(rows, device=device)[:, None, None]
    place_T = torch.arange(length, device=device)
    return rule_of(attention, window)(row_B11, place_T[None, :, None], place_T[None, None, :])[:, None]


def rule_of(attention: Attention, window: int | None = None) -> Rule:
    """The definition of each attention spec of `batch.view`, in a form that broadcasts and flex attention compiles."""
    document_ids_BT = attention.document_ids_BT
    if isinstance(attention, CausalDocuments):

        def causal(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            # Same document, and no later place of the row: packed documents never see each other.
            inside = (document_ids_BT[b, q] == document_ids_BT[b, k]) & (q >= k)
            return inside if window is None else inside & (q - k < window)

        return causal
    shown_at_BT, sees_to_BT = attention.shown_at_BT, attention.sees_to_BT
    groups_BT, places_BT = attention.groups_BT, attention.places_BT

    def ordered(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # By order: the key comes early enough for the query. By group: members see each other.
        shown = shown_at_BT[b, k] <= sees_to_BT[b, q]
        together = (groups_BT[b, k] == groups_BT[b, q]) & (groups_BT[b, k] >= 0)
        inside = (document_ids_BT[b, q] == document_ids_BT[b, k]) & (shown | together)
        return inside if window is None else inside & (places_BT[b, q] - places_BT[b, k] < window)

    return ordered


def block_mask(attention: Attention, window: int | None = None) -> Any:
    """The same as a flex-attention block mask, which skips the blocks that nobody sees.

    Correct for any ids. If a document's tokens are contiguous, as packing places them, and the order of an
    `OrderedDocuments` follows the places of each half, hardly any block is listed needlessly.
    """
    rule = rule_of(attention, window)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule(b, q, k)

    document_ids_BT = attention.document_ids_BT
    length = document_ids_BT.shape[1]
    first_S = torch.arange(0, length, BLOCK, device=document_ids_BT.device)
    # A block that extends past the row is never seen entirely: the rule hides what lies beyond.
    whole_S = first_S + BLOCK <= length
    # Padding counts as the last document.
    documents_BS = _Range.of(torch.where(document_ids_BT < 0, torch.iinfo(document_ids_BT.dtype).max, document_ids_BT))
    # For each pair of blocks: may any query see any key, and do all see all? Bounds answer both, without the entries.
    some_BQS, all_BQS = _causal(first_S, length) if isinstance(attention, CausalDocuments) else _ordered(attention)
    if window is not None:
        places_BS = (
            _places(first_S, length) if isinstance(attention, CausalDocuments) else _Range.of(attention.places_BT)
        )
        # The least and the largest distance of a key of block S behind a query of block Q.
        some_BQS = some_BQS & (places_BS.least_BS[:, :, None] - places_BS.most_BS[:, None, :] < window)
        all_BQS = all_BQS & (places_BS.most_BS[:, :, None] - places_BS.least_BS[:, None, :] < window)
    # A block that contains a boundary of a document or of the row is decided entry by entry.
    all_BQS = all_BQS & documents_BS.one_value() & whole_S[:, None] & whole_S[None, :]
    # Blocks whose ranges of document ids do not overlap have no pair within a document.
    return listed(some_BQS & documents_BS.meet(), all_BQS, seen, length)


@dataclass(frozen=True)
class _Range:
    """The least and the largest of some integers in each block of positions, [B, S] each; B may be 1."""

    least_BS: Tensor
    most_BS: Tensor

    @classmethod
    def of(cls, values_BT: Tensor) -> _Range:
        blocks = -(-values_BT.shape[1] // BLOCK)
        missing = blocks * BLOCK - values_BT.shape[1]
        # The last block is padded with its last value, which changes neither.
        filled_BT = torch.cat([values_BT, values_BT[:, -1:].expand(-1, missing)], 1)
        return cls(*filled_BT.unflatten(1, (blocks, BLOCK)).aminmax(dim=-1))

    def meet(self) -> Tensor:
        """[B, Q, S]: whether blocks Q and S may have a value in common."""
        least_BS, most_BS = self.least_BS, self.most_BS
        # Two intervals overlap if each begins no later than the other ends.
        return (least_BS[:, None, :] <= most_BS[:, :, None]) & (least_BS[:, :, None] <= most_BS[:, None, :])

    def one_value(self) -> Tensor:
        """[B, Q, S]: whether blocks Q and S together hold a single value."""
        one_BS = self.least_BS == self.most_BS
        same_BQS = self.least_BS[:, :, None] == self.least_BS[:, None, :]
        return one_BS[:, :, None] & one_BS[:, None, :] & same_BQS


def _places(first_S: Tensor, length: int) -> _Range:
    return _Range(first_S[None], (first_S + BLOCK - 1).clamp(max=length - 1)[None])


def _causal(first_S: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """[1, Q, S] twice: whether in any pair, and whether in every pair, the key is not after the query in the row."""
    places = _places(first_S, length)
    return (
        places.most_BS[:, :, None] >= places.least_BS[:, None, :],
        places.least_BS[:, :, None] >= places.most_BS[:, None, :],
    )


def _ordered(attention: OrderedDocuments) -> tuple[Tensor, Tensor]:
    """[B, Q, S] twice: whether in any pair, and whether in every pair, the query sees the key by order or by group."""
    shown_BS, sees_BS, groups_BS = map(_Range.of, (attention.shown_at_BT, attention.sees_to_BT, attention.groups_BT))
    # The earliest key with the query that sees farthest, and the latest key with the one that sees least.
    shown_some = shown_BS.least_BS[:, None, :] <= sees_BS.most_BS[:, :, None]
    shown_all = shown_BS.most_BS[:, None, :] <= sees_BS.least_BS[:, :, None]
    # By group, leaving out positions in none.
    in_some_BS = groups_BS.most_BS >= 0
    # The least group of the positions in one: -1 would extend the range to every other block's.
    least_BS = _Range.of(torch.where(attention.groups_BT < 0, NEVER, attention.groups_BT)).least_BS
    both_BQS = in_some_BS[:, :, None] & in_some_BS[:, None, :]
    group_some = both_BQS & _Range(least_BS, groups_BS.most_BS).meet()
    group_all = groups_BS.one_value() & both_BQS
    return shown_some | group_some, shown_all | group_all


def listed(some_BQS: Tensor, all_BQS: Tensor, seen: Any, length: int) -> Any:
    """A block mask over rows of `length` positions from two tables of blocks of `BLOCK` positions, [B, queries, keys].

    `some_BQS`: whether any pair may be seen; a block where it is False is skipped, and one too many only costs time.
    `all_BQS`: whether every pair is seen; the rule `seen` is not evaluated there.
    """
    from torch.nn.attention.flex_attention import BlockMask

    numbers = []
    for blocks_BQS in (some_BQS & ~all_BQS, all_BQS):
        blocks_B1QS = blocks_BQS[:, None].to(torch.int32)
        # Stable: the blocks that count come first, in their order.
        order_B1QS = torch.argsort(blocks_B1QS, dim=-1, descending=True, stable=True).to(torch.int32)
        # The number of key blocks of each query block, and their indices, then the others: flex attention's format.
        numbers += [blocks_B1QS.sum(-1, dtype=torch.int32), order_B1QS.contiguous()]
    return BlockMask.from_kv_blocks(*numbers, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length))
