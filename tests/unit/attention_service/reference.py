"""What a layer attends with, computed step by step from transformers' own modules: the truth for the attention tests.

Nothing here goes through the attention function that the service taps: projections, norms and RoPE are applied to the
hidden states that the whole model gives out.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

PARTS = ("query", "key", "value")


def load_whole(folder: Path) -> Any:
    """The whole model in float32 with eager attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def true_states(model: Any, tokens_T: np.ndarray, layer: int) -> dict[str, np.ndarray]:
    """query [T, H, d], key and value [T, G, d] in float32."""
    body = model.base_model
    ids_1T = torch.tensor(tokens_T)[None]
    hidden_1TD = body(ids_1T, output_hidden_states=True, use_cache=False).hidden_states[layer]
    block, attention = body.layers[layer], body.layers[layer].self_attn
    x_1TD = block.input_layernorm(hidden_1TD)
    shape = (1, len(tokens_T), -1, attention.head_dim)
    query, key, value = (getattr(attention, f"{name}_proj")(x_1TD).view(shape) for name in "qkv")
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    if getattr(attention, "use_rope", True):
        positions_1T = torch.arange(len(tokens_T))[None]
        extra = (body.config.layer_types[layer],) if body.config.model_type == "gemma3_text" else ()
        cos, sin = body.rotary_emb(x_1TD, positions_1T, *extra)
        rotate = importlib.import_module(type(attention).__module__).apply_rotary_pos_emb
        query, key = rotate(query, key, cos, sin)
    states = (query.transpose(1, 2), key.transpose(1, 2), value)
    return {part: x[0].numpy() for part, x in zip(PARTS, states, strict=True)}


@torch.no_grad()
def true_maps(model: Any, tokens_T: np.ndarray, layer: int) -> np.ndarray:
    """[H, T, T] float32, as `output_attentions` has them."""
    output = model(torch.tensor(tokens_T)[None], output_attentions=True, use_cache=False)
    return output.attentions[layer][0].numpy()
