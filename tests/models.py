"""Tiny models that tests make on the spot: random weights, a real tokenizer, saved as a folder like any other.

The fixtures over them are in `conftest.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCAB_SIZE = 512
_TEXT = "The still takes a wash and gives a spirit; def run(self, x): return [x * 2 for _ in range(10)]\n"


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens: it can spell any text, and round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_tiny_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random Llama with its tokenizer in `folder`: V=512, 2 layers, H=64, head_dim 32, GQA of 2 heads to 1.

    Weights are drawn wide enough for distributions that are neither flat nor one-hot. `changes` go to LlamaConfig.
    """
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = LlamaConfig(**(settings | changes))
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer(min(VOCAB_SIZE, config.vocab_size)).save_pretrained(folder)
    return folder


def save_tiny_wrapper(folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A random language model beside a vision tower, with a tokenizer and no image processor: V=512, 2 layers, H=64.

    `family` is gemma3 (whose head is tied), mistral3, ministral3, qwen2_5_vl or qwen3_vl.
    """
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
        "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    tower: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
    layers: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config: Any
    model: Any
    torch.manual_seed(seed)
    if family == "gemma3":
        text |= {"query_pre_attn_scalar": 32, "sliding_window": 16}
        text |= {"layer_types": ["sliding_attention", "full_attention"]}
        config = Gemma3Config(
            text_config=text, vision_config=tower | layers, mm_tokens_per_image=4, image_token_index=500,
            boi_token_index=501, eoi_token_index=502,
        )  # fmt: skip
        model = Gemma3ForConditionalGeneration(config)
    elif family in ("mistral3", "ministral3"):
        text |= {"model_type": family.removesuffix("3") if family == "mistral3" else family, "sliding_window": None}
        if family == "ministral3":
            text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
                                       "original_max_position_embeddings": 128}  # fmt: skip
        vision = tower | layers | {"model_type": "pixtral", "head_dim": 16}
        config = Mistral3Config(
            text_config=text, vision_config=vision, image_token_index=500, tie_word_embeddings=False
        )
        model = Mistral3ForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
        vision = tower | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}
        del text["head_dim"]
        config = Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": sections}, vision_config=vision | {"fullatt_block_indexes": [0]},
            image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
        vision = tower | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        config = Qwen3VLConfig(
            text_config=text | {"rope_parameters": sections}, vision_config=vision, image_token_id=500,
            video_token_id=501, vision_start_token_id=502, vision_end_token_id=503, tie_word_embeddings=False,
        )  # fmt: skip
        model = Qwen3VLForConditionalGeneration(config)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
