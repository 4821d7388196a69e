"""The largest attention logits of each head, computed tile by tile. Called by `qk_clip`."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of logits that exist at a time: what a CPU's cache holds, and enough to keep a GPU busy.
TILE_BYTES = {"cpu": 2**22, "cuda": 2**28}
LEAST_ROWS = 32
# Additive masks hide with the least number of their dtype or something near it.
HIDDEN_BELOW = -1e4


class Span(NamedTuple):
    """A range of queries, the range of keys that any of them sees, and the range of those that not all of them see."""

    queries: slice
    keys: slice
    partly: slice


class Visibility:
    """Which keys each query of a row sees: the mask that attention was given, in any of its forms.

    `mask`: None (`causal` decides), booleans or an additive mask [B or 1, H or 1, T, T], or flex attention's block
    mask. `valid_BT`: False at padding, which neither sees nor is seen.
    """

    def __init__(self, mask: Any, causal: bool, valid_BT: Tensor | None, length: int, device: torch.device) -> None:
        if mask is not None and not isinstance(mask, Tensor) and not hasattr(mask, "mask_mod"):
            raise ValueError(f"attention mask: got {type(mask).__name__}, expected a tensor or a block mask")
        if isinstance(mask, Tensor) and mask.ndim != 4:
            raise ValueError(f"attention mask: got shape {tuple(mask.shape)}, expected [batch, heads, queries, keys]")
        self.mask = mask
        self.causal = causal
        self.valid_BT = valid_BT
        self.length = length
        self.device = device
        self._spans: tuple[int, list[Span]] | None = None

    def tile(self, queries: slice, keys: slice) -> Tensor | None:
        """Booleans [B or 1, H or 1, queries, keys], or None if everything is seen."""
        seen = self._masked(queries, keys)
        if self.valid_BT is not None:
            valid = self.valid_BT[:, None, queries, None] & self.valid_BT[:, None, None, keys]
            seen = valid if seen is None else seen & valid
        return seen

    def _masked(self, queries: slice, keys: slice) -> Tensor | None:
        if isinstance(self.mask, Tensor):
            tile = self.mask[:, :, queries, keys]
            return tile if tile.dtype == torch.bool else tile > HIDDEN_BELOW
        if self.mask is not None:
            return self._of_blocks(queries, keys)
        # No key of the tile comes after its first query: nothing is hidden.
        if not self.causal or keys.stop <= queries.start + 1:
            return None
        place_T = torch.arange(self.length, device=self.device)
        return (place_T[queries, None] >= place_T[None, keys])[None, None]

    def _of_blocks(self, queries: slice, keys: slice) -> Tensor:
        from torch.nn.attention.flex_attention import create_mask

        mask_mod = self.mask.mask_mod

        def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            # The mask counts from the start of the row, the tile from its own start.
            return mask_mod(b, h, q + queries.start, k + keys.start)

        batch, heads = self.mask.shape[:2]
        size = (queries.stop - queries.start, keys.stop - keys.start)
        return create_mask(shifted, batch, heads, *size, device=str(self.device))

    def spans(self, rows: int) -> list[Span]:
        """One for each block of `rows` queries."""
        if self._spans is None or self._spans[0] != rows:
            self._spans = (rows, self._find_spans(rows))
        return self._spans[1]

    def _find_spans(self, rows: int) -> list[Span]:
        blocks = [slice(start, min(start + rows, self.length)) for start in range(0, self.length, rows)]
        everything = slice(0, self.length)
        if self.mask is None and self.valid_BT is None:
            if not self.causal:
                return [Span(block, everything, slice(0, 0)) for block in blocks]
            # Causal: keys up to the block's end, of which those after its first query are not seen by all.
            return [Span(block, slice(0, block.stop), slice(block.start + 1, block.stop)) for block in blocks]
        bounds = []
        for block in blocks:
            tile = self.tile(block, everything)
            assert tile is not None
            seen_QT = tile.flatten(0, 2)
            seen_T = seen_QT.any(0)
            bounds += [*_bounds(seen_T), *_bounds(seen_T & ~seen_QT.all(0))]
        numbers = iter(torch.stack(bounds).tolist())  # the only wait for a GPU, once per pass
        return [Span(block, slice(*islice(numbers, 2)), slice(*islice(numbers, 2))) for block in blocks]


def _bounds(flags_T: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the first True, and the index after the last one; both 0 if there is none."""
    any_ = flags_T.any()
    return flags_T.byte().argmax() * any_, (len(flags_T) - flags_T.flip(0).byte().argmax()) * any_


def largest_logits(query_BHTd: Tensor, key_BKTd: Tensor, visibility: Visibility, scaling: float) -> Tensor:
    """max over batch, queries and the keys that they see of scaling * q . k, for each query head: float32 [H].

    Query head h reads key head h // (H / K), as transformers repeats them. -inf where nothing is seen. The products
    are computed in the states' dtype.
    """
    batch, heads, length, width = query_BHTd.shape
    key_heads = key_BKTd.shape[1]
    group = heads // key_heads
    query_BKGTd = query_BHTd.reshape(batch, key_heads, group, length, width)
    row_bytes = batch * heads * length * query_BHTd.element_size()
    rows = min(length, max(LEAST_ROWS, TILE_BYTES.get(query_BHTd.device.type, 2**26) // row_bytes))
    largest_KG = query_BHTd.new_full((key_heads, group), -torch.inf)
    for span in visibility.spans(rows):
        if span.keys.stop <= span.keys.start:
            continue
        # The G query heads that share a key head are more rows of the same product.
        tile = query_BKGTd[:, :, :, span.queries].flatten(2, 3) @ key_BKTd[:, :, span.keys].transpose(2, 3)
        tile = tile.unflatten(2, (group, -1))
        seen = visibility.tile(span.queries, span.partly) if span.partly.stop > span.partly.start else None
        if seen is not None:
            seen = seen[:, :, None] if seen.shape[1] == 1 else seen.unflatten(1, (key_heads, group))
            hidden = slice(span.partly.start - span.keys.start, span.partly.stop - span.keys.start)
            tile[..., hidden].masked_fill_(~seen, -torch.inf)
        # Over keys, then over batch and queries. Scaling is positive and commutes with the maximum, so it comes last.
        largest_KG = torch.maximum(largest_KG, tile.amax(4).amax((0, 3)))
    return largest_KG.flatten().float() * scaling
