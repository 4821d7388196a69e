"""Models with a vision tower (wrappers): how vLLM serves their language model, and nothing else of the checkpoint.

Used by `vllm_options.py`, by `vllm_process.py`, and by `vllm_adapter.py` inside vLLM.

vLLM's classes for such models import transformers' image processors, which need torchvision: no CPU installation of
ours has it. The language models in TEXT_ARCHITECTURES are plain ones under longer names, so vLLM is given its own class
for those, with their part of config.json and of the weights; nothing of the tower is imported, read or kept. For any
other wrapper, vLLM uses its own class with `language_model_only`; if that needs torchvision, `missing` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from teacher_proto.model_files import ModelFolder

# By the `model_type` of the language model's part of config.json.
TEXT_ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
# Prefixes of these weights' names: in current checkpoints, in those of transformers before 4.52, and in Qwen's first
# wrappers, which use plain names.
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    *((name, name) for name in ("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.")),
)
_WRAPPED = "stillhouse_wrapped"


def text_architecture(folder: ModelFolder) -> str | None:
    """vLLM's architecture for the language model in this wrapper; None for any other model.

    The config of a quantised checkpoint uses the wrapper's names, so vLLM's own class serves it.
    """
    text = folder.config.get("text_config") or {}
    if not is_wrapper(folder) or folder.config.get("quantization_config"):
        return None
    return TEXT_ARCHITECTURES.get(text.get("model_type", ""))


def is_wrapper(folder: ModelFolder) -> bool:
    return bool(folder.config.get("text_config")) and bool(folder.config.get("vision_config"))


def missing(folder: ModelFolder, error: ImportError) -> str | None:
    """The message if vLLM's class for a wrapper can't be imported; None for any other error."""
    if not is_wrapper(folder) or error.name is None or error.name.partition(".")[0] != "torchvision":
        return None
    architecture = ", ".join(folder.config.get("architectures") or ["?"])
    return (
        f"vLLM's class for {architecture} imports image processors, which need torchvision, but it is not installed: "
        "install the torchvision that matches this torch. Without it, of the models with a vision tower only these "
        f"language models can be served, and only unquantised: {', '.join(TEXT_ARCHITECTURES)}"
    )


@dataclass(frozen=True)
class TextConfig:
    """vLLM's `hf_overrides` for a wrapper: its language model's part of the config, with `overrides` applied.

    Overrides under `text_config` apply to that part too, as they do if vLLM is given the wrapper.
    """

    architecture: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, config: Any) -> Any:
        text = config.get_text_config()
        tied = getattr(config, "tie_word_embeddings", None)
        if tied is not None:
            text.tie_word_embeddings = tied
        # The three coordinates of a text token are equal, which makes this plain RoPE.
        rope = dict(getattr(text, "rope_parameters", None) or {})
        for name in ("mrope_section", "mrope_interleaved"):
            rope.pop(name, None)
        if rope:
            text.rope_parameters = rope
        if beta := rope.get("llama_4_scaling_beta"):
            # Ministral 3's factor for queries at far positions, under the name that vLLM reads.
            far = rope["original_max_position_embeddings"]
            text.llama_4_scaling = {"beta": beta, "original_max_position_embeddings": far}
        given = dict(self.overrides)
        text.update({**given, **given.pop("text_config", {})})
        text.update({"architectures": [self.architecture], _WRAPPED: True})
        return text


def weights_of(config: Any, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """A checkpoint's weights under the names that the model of `config` uses; of a wrapper, only those of its language
    model."""
    if not getattr(config, _WRAPPED, False):
        yield from weights
        return
    for name, weight in weights:
        for prefix, replacement in _PREFIXES:
            if name.startswith(prefix):
                yield replacement + name.removeprefix(prefix), weight
                break
