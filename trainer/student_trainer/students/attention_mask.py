"""Attention that stops at a document's edges: masks for packed rows. Called by `causal`.

A mask for SDPA is dense. One for flex attention is a rule, and a list of the blocks of the map that the rule leaves
anything of; the list is made from the first and last document of each block, so no dense array comes into being.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Places a block of flex attention has on each side.
BLOCK = 128


def dense_mask(document_ids_BT: Tensor, window: int | None = None) -> Tensor:
    """Who sees whom, as booleans [B, 1, T, T]: the same document, not later, at most `window` tokens back.

    Padding (document -1) sees padding, so that no row of the softmax is empty; nothing else sees it.
    """
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    place_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    back_TT = place_T[:, None] - place_T[None, :]
    seen_TT = back_TT >= 0 if window is None else (back_TT >= 0) & (back_TT < window)
    return (same_BTT & seen_TT)[:, None]


def block_mask(document_ids_BT: Tensor, window: int | None = None) -> Any:
    """The same as a flex-attention block mask, which skips the blocks that nobody sees.

    Right for any ids. Where a document's tokens stand together, as packing places them, no block is listed in vain.
    """

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (document_ids_BT[b, q] == document_ids_BT[b, k]) & (q >= k)
        return inside if window is None else inside & (q - k < window)

    length = document_ids_BT.shape[1]
    first_S = torch.arange(0, length, BLOCK, device=document_ids_BT.device)
    last_S = (first_S + BLOCK - 1).clamp(max=length - 1)
    # The nearest and the farthest that a key of block S lies behind a query of block Q.
    nearest_QS = first_S[:, None] - last_S[None, :]
    farthest_QS = last_S[:, None] - first_S[None, :]
    # A block that reaches beyond the row is never seen wholly: the rule hides what lies beyond.
    whole_S = first_S + BLOCK <= length
    some_QS = farthest_QS >= 0
    all_QS = (nearest_QS >= 0) & whole_S[:, None] & whole_S[None, :]
    if window is not None:
        some_QS, all_QS = some_QS & (nearest_QS < window), all_QS & (farthest_QS < window)
    least_BS, most_BS = _documents_by_block(document_ids_BT, len(first_S))
    meet_BQS = (least_BS[:, None, :] <= most_BS[:, :, None]) & (least_BS[:, :, None] <= most_BS[:, None, :])
    one_BS = least_BS == most_BS
    same_BQS = one_BS[:, :, None] & one_BS[:, None, :] & (least_BS[:, :, None] == least_BS[:, None, :])
    return listed(some_QS & meet_BQS, all_QS & same_BQS, seen, length)


def listed(some_BQS: Tensor, all_BQS: Tensor, seen: Any, length: int) -> Any:
    """A block mask over rows of `length` places from two tables of its blocks of `BLOCK` places, [B, queries, keys].

    `some_BQS`: whether any pair may be seen; a block where it is False is skipped, one too many costs time alone.
    `all_BQS`: whether every pair is seen; there the rule `seen` is not asked.
    """
    from torch.nn.attention.flex_attention import BlockMask

    numbers = []
    for blocks_BQS in (some_BQS & ~all_BQS, all_BQS):
        blocks_B1QS = blocks_BQS[:, None].to(torch.int32)
        # Stable: the blocks that count come first, in their order.
        order_B1QS = torch.argsort(blocks_B1QS, dim=-1, descending=True, stable=True).to(torch.int32)
        numbers += [blocks_B1QS.sum(-1, dtype=torch.int32), order_B1QS.contiguous()]
    return BlockMask.from_kv_blocks(*numbers, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length))


def _documents_by_block(document_ids_BT: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The least and the largest document of each block of places, [B, S] twice; padding counts as the last document."""
    padded_BT = torch.where(document_ids_BT < 0, torch.iinfo(document_ids_BT.dtype).max, document_ids_BT)
    missing = blocks * BLOCK - padded_BT.shape[1]
    # The last block is filled up with its last place's document, which changes neither.
    filled_BT = torch.cat([padded_BT, padded_BT[:, -1:].expand(-1, missing)], 1)
    least_BS, most_BS = filled_BT.unflatten(1, (blocks, BLOCK)).aminmax(dim=-1)
    return least_BS, most_BS
