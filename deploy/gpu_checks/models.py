"""Makes models with random weights and data of token ids, so that no section needs a download. Used by several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.models import tiny_tokenizer

VOCAB_SIZE = 151_936
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "initializer_range": 0.2}  # fmt: skip
# The shapes of the models of these names.
QWEN3_0_6B = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCAB_SIZE}  # fmt: skip
QWEN3_1_7B = QWEN3_0_6B | {"hidden_size": 2048, "intermediate_size": 6144}


def save_qwen3(folder: Path, shape: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a Qwen3 of that shape with a tiny tokenizer. Initialised on torch's default device."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **shape, tie_word_embeddings=True, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, dtype=dtype
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tokens(path: Path, documents: int, longest: int, seed: int = 0) -> Path:
    """JSON lines of random ids of the tiny tokenizer; documents of a quarter of `longest` to `longest` tokens."""
    draw, most = np.random.default_rng(seed), len(tiny_tokenizer())
    with path.open("w") as file:
        for _ in range(documents):
            ids = draw.integers(2, most, int(draw.integers(longest // 4, longest + 1)))
            file.write(json.dumps({"input_ids": ids.tolist()}) + "\n")
    return path
