"""Tiny random models of the families that the ternary student is promised for."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitNetConfig, LlamaConfig, Qwen2Config, Qwen3Config

from student_trainer.students.quant_linear import quantise
from student_trainer.students.quantisers.bitnet import BITNET

VOCAB = 97
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "bitnet": BitNetConfig}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Two layers of width 64, four heads of 16 over two key-value heads."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return FAMILIES[family](**(settings | overrides))


def tiny_model(family: str, seed: int = 0, attention: str = "sdpa", dtype: Any = None, **overrides: Any) -> Any:
    """In evaluation mode, with weights large enough that every part of the model matters, norms included."""
    torch.manual_seed(seed)
    config = tiny_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    spread_weights(model)
    return model.eval()


def spread_weights(model: Any) -> None:
    """Matrices of unit gain, norms and biases around their usual values but not at them."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


def tiny_ids(rows: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def convert_to_bitnet(model: Any, **how: Any) -> Any:
    """The model with ternary linears, in place."""
    return quantise(model, "bitnet", **how)


def ternary_codes(linear: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [O, I] of a linear's latent weight, and the float32 scalar scale."""
    return BITNET.codes(linear.weight)
