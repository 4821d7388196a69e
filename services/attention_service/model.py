"""A transformers language model truncated above the highest layer served: token ids in, attention out. For `engine.py`.

Weights of higher layers and the head are never read; a pass ends in the highest layer wanted, before it attends.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from attention_service.records import make_record
from attention_service.tap import Attended, Tap
from teacher_proto.attention import AttentionQuery, AttentionShape
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.compute.hf_model import padded
from teacher_proto.hardware import choose_dtype, device_name, emulation_warning, pick_device
from teacher_proto.model_files import ModelFolder

log = logging.getLogger(__name__)
# Decoders whose attention the tests compare with transformers' own maps.
MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
# Language models with a vision tower, which is left out. The last is a plain one except for three-dimensional
# positions, whose coordinates are equal in text. The mapping turns weight names, current and former, into plain ones.
WRAPPED_TYPES = ("gemma3_text", "mistral", "qwen3_vl_text")
_WRAPPED_WEIGHTS = {r"^(model\.language_model\.|language_model\.model\.)": ""}


class AttentionModel:
    """The lower layers on their device; `dtype` has the same values as in `HfModel`. ValueError for an architecture
    that is not in MODEL_TYPES or WRAPPED_TYPES.
    """

    def __init__(self, folder: ModelFolder, *, dtype: str, device: str, highest_layer: Callable[[int], int]):
        config = _config(folder)
        self.num_layers: int = config.num_hidden_layers
        self.max_layer = highest_layer(self.num_layers)
        self.device = torch.device(pick_device(device))
        chosen = choose_dtype(dtype, self.device, folder.dtype)
        if warning := emulation_warning(chosen, self.device):
            log.warning("%s: %s", folder.name, warning)
        self._model = _load(folder, _cut(config, self.max_layer), chosen).to(self.device)
        self._tap = Tap(self._model)
        self.dtype: torch.dtype = self._model.dtype
        self.attention: str = self._model.config._attn_implementation
        self.vocab_size: int = self._model.get_input_embeddings().weight.shape[0]
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.shape = self._measure(folder.name)

    @property
    def device_name(self) -> str:
        return device_name(self.device)

    @torch.inference_mode()
    def attend(self, queries: Sequence[AttentionQuery]) -> list[AttentionTargets]:
        """The record of each query, from one forward pass over all. EngineError for numbers that are not finite."""
        layers = {query.spec.layer for query in queries}
        taken = self._attend([query.tokens_T for query in queries], layers)
        return [make_record(query, taken[query.spec.layer], place) for place, query in enumerate(queries)]

    def _attend(self, sequences: Sequence[np.ndarray], layers: set[int]) -> dict[int, Attended]:
        inputs = padded(sequences, self.device)
        return self._tap.take(lambda: self._model(**inputs, use_cache=False), layers)

    @torch.inference_mode()
    def _measure(self, name: str) -> AttentionShape:
        """The heads of the layers, from passes over one token. ValueError if layers differ."""
        shapes = set()
        for layer in range(self.max_layer + 1):
            attended = self._attend([np.zeros(1, dtype=np.int64)], {layer})[layer]
            states = (attended.query_BHTd, attended.key_BGTd, attended.value_BGTd)
            shapes.add(tuple((x.shape[1], x.shape[3]) for x in states))
        (query_heads, width), (kv_heads, key_width), value = next(iter(shapes))
        if len(shapes) > 1 or key_width != width or value != (kv_heads, width):
            raise ValueError(f"{name}: the heads differ between layers ({sorted(shapes)}), which is not supported")
        return AttentionShape(
            num_layers=self.num_layers, max_layer=self.max_layer, query_heads=query_heads, kv_heads=kv_heads,
            head_width=width,
        )  # fmt: skip


def _config(folder: ModelFolder) -> Any:
    """The text model's config. ValueError if its architecture is not served."""
    try:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder.name}: transformers cannot read its config: {_first_line(error)}") from error
    text = config.get_text_config()
    if text.model_type not in (MODEL_TYPES if text is config else WRAPPED_TYPES):
        raise ValueError(
            f"{folder.name} is a {config.model_type!r} model; attention is served for {', '.join(MODEL_TYPES)}, and "
            f"beside a vision tower for {', '.join(WRAPPED_TYPES)}"
        )
    return text


def _cut(config: Any, max_layer: int) -> Any:
    """The config of the same model without the layers above `max_layer`."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = max_layer + 1
    for name in ("layer_types", "no_rope_layers"):
        if getattr(cut, name, None) is not None:
            setattr(cut, name, getattr(cut, name)[: max_layer + 1])
    # SDPA has no soft cap: a model with one needs eager attention.
    capped = getattr(cut, "attn_logit_softcapping", None) is not None
    cut._attn_implementation = "eager" if capped else "sdpa"
    return cut


def _load(folder: ModelFolder, config: Any, dtype: torch.dtype) -> Any:
    """Load the weights. ValueError with the first line of transformers' error, or if the files lack a weight."""
    # transformers would list the weights above the cut as unexpected.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    names = {"key_mapping": _WRAPPED_WEIGHTS} if "text_config" in folder.config else {}
    try:
        model, report = AutoModel.from_pretrained(
            folder.path, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False,
            use_safetensors=True, output_loading_info=True, **names,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"transformers cannot load {folder.name}: {_first_line(error)}") from error
    if report["missing_keys"]:
        raise ValueError(f"{folder.name}: its files lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
