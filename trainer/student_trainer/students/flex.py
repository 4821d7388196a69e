"""Flex attention for a view's block masks, SDPA for every other forward pass of the same model. Used by `load`.

Registered with transformers as `IMPLEMENTATION`. Flex attention is compiled, and compiled again for other kinds of
shapes; checking a head on four tokens, or writing text token by token, is not worth that. So the mask decides: with a
`BlockMask`, which `attention_mask` makes for a packed row, flex attention runs; with a dense mask, which transformers
makes for this implementation as for SDPA, SDPA does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

IMPLEMENTATION = "stillhouse_flex"
# What SDPA would silently ignore.
BEYOND_SDPA = ("softcap", "s_aux")


def attend(
    module: Any, query_BHTd: Tensor, key_BKTd: Tensor, value_BKTd: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attention [B, T, H, d] of one layer and, from some implementations, its weights, as transformers calls it."""
    if isinstance(attention_mask, BlockMask):
        # Under autocast rotary embeddings leave query and key in float32 but the value in bfloat16. SDPA casts them;
        # flex attention does from torch 2.13 on, and refuses them before.
        dtype = value_BKTd.dtype
        return flex_attention_forward(
            module, query_BHTd.to(dtype), key_BKTd.to(dtype), value_BKTd, attention_mask, **kwargs
        )
    if all(kwargs.get(name) is None for name in BEYOND_SDPA):
        return sdpa_attention_forward(module, query_BHTd, key_BKTd, value_BKTd, attention_mask, **kwargs)
    # The model's own eager attention, which adds its mask to the scores.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    # Booleans as an additive mask: 0 where seen, the dtype's least number elsewhere, whose exponential is 0.
    added = torch.where(attention_mask, 0.0, torch.finfo(query_BHTd.dtype).min).to(query_BHTd.dtype)
    return eager(module, query_BHTd, key_BKTd, value_BKTd, added, **kwargs)


def dense_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's mask, always with the causal part made explicit: a layer with a soft cap has no other way to know."""
    mask: Tensor | None = sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))
    return mask


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, dense_mask)
