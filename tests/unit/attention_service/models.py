"""A tiny random model of every architecture whose attention is served, saved as a folder like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import tiny_tokenizer

VOCAB = 512
LAYERS = 4
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip
_HALF_LOCAL = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {**_HALF_LOCAL, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    "gemma3_text": {**_HALF_LOCAL, "query_pre_attn_scalar": 32},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}


def save_tiny(
    folder: Path, model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random model of LAYERS layers in `dtype`: 4 query heads and 2 key and value heads of 16."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(_COMMON | CHANGES.get(model_type, {}) | changes))
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer(VOCAB).save_pretrained(folder)
    return folder
