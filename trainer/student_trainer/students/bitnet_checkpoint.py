"""Loads a ternary student from a path: a full-precision model, transformers' own BitNet, or one of our exports.

Called by `bitnet_student`. What cannot be trained, because only its ternary codes were kept, is refused.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from student_trainer.students.bitnet import CONFIG_ENTRY, SubNorm, convert_to_bitnet

Task = Literal["causal", "classification"]

log = logging.getLogger(__name__)


def load_bitnet_student(
    path: str, *, revision: str | None = None, sub_norm: SubNorm | None = None, eps: float | None = None,
    quantise_activations: bool | None = None, task: Task = "causal", num_labels: int | None = None,
    dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa",
) -> Any:  # fmt: skip
    """A model whose decoder is ternary and whose latent weights come from `path` (a folder or a hub name).

    A checkpoint that is a BitNet student already decides how it is ternary; naming another value is an error.
    Otherwise None means the defaults of `convert_to_bitnet`. `task` "classification" puts a head of `num_labels`
    classes on the decoder; a head that the checkpoint lacks is initialised at random.
    Raises ValueError for packed or otherwise quantised checkpoints and for settings that contradict the checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, revision=revision)
    record = _recorded(config, path)
    if task == "classification":
        if num_labels is None:
            raise ValueError("task 'classification' needs num_labels")
        config.num_labels = num_labels
    factory = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    common = {"dtype": dtype, "attn_implementation": attn_implementation}
    if record is None:
        model = factory.from_pretrained(path, config=config, revision=revision, use_safetensors=True, **common)
        return convert_to_bitnet(
            model, sub_norm=sub_norm or "output", quantise_activations=quantise_activations is not False, eps=eps
        )
    for name, asked in (("sub_norm", sub_norm), ("eps", eps), ("quantise_activations", quantise_activations)):
        if asked is not None and asked != record[name]:
            raise ValueError(f"{path} was trained with {name}={record[name]}, got {asked}; leave it out")
    model = factory.from_config(config, **common)
    own_norms = config.model_type == "bitnet"
    convert_to_bitnet(
        model, sub_norm=record["sub_norm"], quantise_activations=record["quantise_activations"],
        eps=None if own_norms or record["sub_norm"] == "none" else record["eps"],
    )  # fmt: skip
    _load_weights(model, _folder_of(path, revision), dtype)
    return model


def _recorded(config: Any, path: str) -> dict[str, Any] | None:
    """What made the checkpoint ternary, None for a full-precision one. Takes `quantization_config` off the config."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        quantisation = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        del config.quantization_config
        method, mode = quantisation.get("quant_method"), quantisation.get("quantization_mode", "offline")
        if method != "bitnet":
            raise ValueError(f"{path} is quantised with '{method}': a student needs latent weights, give the original")
        if mode != "online":
            raise ValueError(
                f"{path} holds packed ternary weights (quantization_mode '{mode}'): their latent weights are gone, so "
                "they cannot be trained; give the bf16 checkpoint, or the export of format 'hf'"
            )
    record = getattr(config, CONFIG_ENTRY, None)
    if record is None and (quantisation is not None or config.model_type == "bitnet"):
        normed = "all" if (quantisation or {}).get("use_rms_norm") else "none"
        own_norms = config.model_type == "bitnet"
        eps = config.rms_norm_eps if own_norms else (quantisation or {}).get("rms_norm_eps", 1e-6)
        record = {"sub_norm": "output" if own_norms else normed, "eps": eps}
    return None if record is None else {"quantise_activations": True, **record}


def _folder_of(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def _load_weights(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Fill the model from the folder's safetensors. Only a head may be missing, and only a head may be left over."""
    weights = {name: tensor.to(dtype) for name, tensor in _read_safetensors(folder).items()}
    try:
        outcome = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # torch's way to say that a shape differs
        raise ValueError(f"{folder} does not fit the model: {error}") from None
    model.tie_weights()
    inside = f"{model.base_model_prefix}."
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [n for n in outcome.missing_keys if not n.endswith("quantisation_blend") and n not in tied]
    wrong = [n for n in (*missing, *outcome.unexpected_keys) if n.startswith(inside)]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit the model, the first is {wrong[0]}")
    if missing:
        log.warning("%s has no %s: initialised at random", folder, ", ".join(missing))


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: expected the weights file {name}, it is not there")
        tensors |= load_file(folder / name)
    return tensors
