"""Which wrappers around a language model vLLM is given as that language model, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from teacher_proto.model_files import ModelFolder
from teacher_service.engines.vllm_wrappers import TextConfig, missing, text_architecture, weights_of
from tests.models import save_tiny_wrapper

VISION: dict[str, Any] = {"vision_config": {"model_type": "siglip_vision_model"}}


def folder(**config: Any) -> ModelFolder:
    return ModelFolder(
        Path("/model"), "a model", "local", {"architectures": ["OtherForConditionalGeneration"]} | config
    )


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"text_config": {"model_type": "gemma3_text"}} | VISION, "Gemma3ForCausalLM"),
        ({"text_config": {"model_type": "mistral"}} | VISION, "MistralForCausalLM"),
        ({"text_config": {"model_type": "ministral3"}} | VISION, "Ministral3ForCausalLM"),
        ({"text_config": {"model_type": "qwen2_5_vl_text"}} | VISION, "Qwen2ForCausalLM"),
        ({"text_config": {"model_type": "qwen3_vl_text"}} | VISION, "Qwen3ForCausalLM"),
        ({"text_config": {"model_type": "gemma3_text"}, "quantization_config": {"quant_method": "awq"}} | VISION, None),
        ({"text_config": {"model_type": "something_text"}} | VISION, None),
        ({"text_config": {"model_type": "gemma3_text"}}, None),
        ({"model_type": "mistral"}, None),
    ],
)
def test_a_language_model_in_a_wrapper_is_told_by_its_type(config: dict[str, Any], architecture: str | None) -> None:
    assert text_architecture(folder(**config)) == architecture


def test_torchvision_is_named_where_a_wrapper_s_class_needs_it() -> None:
    lacking = ModuleNotFoundError("No module named 'torchvision'", name="torchvision.transforms")
    wrapper = folder(text_config={"model_type": "something_text"}, **VISION)
    told = missing(wrapper, lacking)
    assert told is not None and "OtherForConditionalGeneration" in told and "install the torchvision" in told
    assert missing(wrapper, ModuleNotFoundError("No module named 'triton'", name="triton")) is None
    assert missing(folder(model_type="llama"), lacking) is None


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "ministral3", "qwen2_5_vl", "qwen3_vl"])
def test_config_and_weights_become_the_language_model_s(tmp_path: Path, family: str) -> None:
    path = save_tiny_wrapper(tmp_path / family, family)
    whole = AutoConfig.from_pretrained(path)
    text = TextConfig("AnArchitecture", {"head_dtype": "float32", "text_config": {"rms_norm_eps": 0.5}})(whole)
    assert text.architectures == ["AnArchitecture"] and text.head_dtype == "float32" and text.rms_norm_eps == 0.5
    assert text.hidden_size == 64 and text.tie_word_embeddings == (family == "gemma3")
    assert "mrope" not in json.dumps(text.rope_parameters)
    saved = load_file(path / "model.safetensors")
    kept = dict(weights_of(text, saved.items()))
    assert len(kept) < len(saved) and all(name.startswith(("model.", "lm_head.")) for name in kept)
    assert "model.embed_tokens.weight" in kept and ("lm_head.weight" in kept) == (family != "gemma3")
    assert not any("vision" in name or "visual" in name or "projector" in name for name in kept)


@pytest.mark.parametrize(("prefix", "head"), [("model.language_model.", "lm_head."),
                                              ("language_model.model.", "language_model.lm_head.")])  # fmt: skip
def test_weights_are_found_under_both_names_that_transformers_has_had(prefix: str, head: str) -> None:
    one = torch.ones(1)
    saved = [(f"{prefix}norm.weight", one), (f"{head}weight", one), ("vision_tower.x.weight", one)]
    assert [name for name, _ in weights_of(SimpleNamespace(stillhouse_wrapped=True), saved)] == [
        "model.norm.weight", "lm_head.weight",
    ]  # fmt: skip
    assert list(weights_of(SimpleNamespace(), saved)) == saved
