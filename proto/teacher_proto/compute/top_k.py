"""The largest logits of each row, in torch, found through the maxima of blocks of columns. Used by `reduction`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Columns per block. The maxima of blocks, taken while the logits are read, tell `top_k` where to look.
BLOCK = 64


def top_k(x_NV: torch.Tensor, k: int, maxima_Nb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, largest first, and their columns; fp32 and int64.

    They are in the k blocks of columns with the largest maxima, so only those are searched: the same values in a tenth
    of the time on a CPU. `maxima` are those of BLOCK columns each, the last block padded with -inf.
    """
    import torch

    n, width = x_NV.shape
    if k >= maxima_Nb.shape[1]:
        return _narrowed(x_NV.float(), k)
    if width % BLOCK:
        x_NV = torch.nn.functional.pad(x_NV, (0, BLOCK - width % BLOCK), value=-torch.inf)
    chosen_NK = _narrowed(maxima_Nb, k, in_order=False)[1]
    # With all rows' blocks numbered consecutively, row n's first block is number n * blocks.
    first_N1 = torch.arange(n, device=x_NV.device)[:, None] * maxima_Nb.shape[1]
    blocks_MB = x_NV.reshape(-1, BLOCK).index_select(0, (chosen_NK + first_N1).flatten())
    values_NK, at_NK = _narrowed(blocks_MB.view(n, -1).float(), k)
    # From places among the chosen blocks to columns of the row; padding of the last block maps to its last column.
    places_NK = chosen_NK.gather(1, at_NK // BLOCK) * BLOCK + at_NK % BLOCK
    return values_NK, places_NK.clamp(max=width - 1)


def _narrowed(x_NC: torch.Tensor, k: int, in_order: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of rows that are in cache, by blocks again. Here a block has every `groups`-th column, since maxima
    of whole vectors cost next to nothing.
    """
    import torch

    n, width = x_NC.shape
    block = width // (4 * k)
    if block < 2:
        return torch.topk(x_NC, k, sorted=in_order)
    groups = width // block
    whole = groups * block
    maxima_Ng = x_NC[:, :whole].reshape(n, block, groups).amax(dim=1)
    chosen_NK = _narrowed(maxima_Ng, k, in_order=False)[1]
    # Group g is columns g, g + groups, g + 2 groups, ...; columns left over after whole groups are all searched.
    steps_b = torch.arange(0, whole, groups, device=x_NC.device)
    left_N = torch.arange(whole, width, device=x_NC.device).expand(n, -1)
    places_NC = torch.cat([(chosen_NK[:, None] + steps_b[:, None]).view(n, -1), left_N], dim=1)
    values_NK, at_NK = _narrowed(x_NC.gather(1, places_NC), k, in_order)
    return values_NK, places_NC.gather(1, at_NK)
