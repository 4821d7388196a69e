"""Attention that stops at a document's edges: masks for packed rows. Called by `causal`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    """The same as a flex-attention block mask, which skips the blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = document_ids_BT.shape

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (document_ids_BT[b, q] == document_ids_BT[b, k]) & (q >= k)
        return inside if window is None else inside & (q - k < window)

    return create_block_mask(seen, rows, None, length, length, device=str(document_ids_BT.device))
