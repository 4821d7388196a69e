"""Loads a quantised student from a path: a full-precision model, one of our exports, or a third-party checkpoint.

Called by `load` and `cli.export`. A checkpoint that cannot be trained, because only its codes were kept, is refused.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_trainer.students.adapters.low_rank import FOLDER, put_corrections, read_peft, train_corrections_alone
from student_trainer.students.quant_linear import BLEND, quantise, quantise_as
from student_trainer.students.quantisers import QUANTISERS
from student_trainer.students.quantisers.record import Record, SubNorm, read_record

log = logging.getLogger(__name__)


def load_quantised(
    path: str, quantiser: str | None = None, *, revision: str | None = None, sub_norm: SubNorm | None = None,
    eps: float | None = None, quantise_activations: bool | None = None, activation_bits: int | None = None,
    bits: int | None = None, group_size: int | None = None, stages: int | None = None,
    dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa",
    config: Any = None,
) -> Any:  # fmt: skip
    """A model whose decoder is quantised and whose latent weights come from `path` (a folder or a hub name).

    A checkpoint of a quantised student already says how it is quantised: then `quantiser` may be None, and a different
    value is an error. Otherwise it is required, and None for another setting means the default of `quantise`.
    A head that the checkpoint lacks is initialised at random.
    An adapter that was exported beside its base is put into it and the base is frozen, as it was trained.
    `config`: that of the checkpoint, if it was read already.
    Raises ValueError for packed or otherwise quantised checkpoints and for settings that contradict the checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config or AutoConfig.from_pretrained(path, revision=revision)
    record = recorded(config, path)
    asked = {
        "sub_norm": sub_norm, "eps": eps, "quantise_activations": quantise_activations,
        "activation_bits": activation_bits, "bits": bits, "group_size": group_size, "stages": stages,
    }  # fmt: skip
    common = {"dtype": dtype, "attn_implementation": attn_implementation}
    if record is None:
        if quantiser is None:
            raise ValueError(f"{path} holds no quantised student: name a quantiser, {', '.join(QUANTISERS)}")
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, revision=revision, use_safetensors=True, **common
        )
        return quantise(model, quantiser, **asked)  # type: ignore[arg-type]
    if different := next(record.differing({"quantiser": quantiser, **asked}), None):
        raise ValueError(f"{path} was trained with {different[0]}={different[1]}, got {different[2]}; leave it out")
    model = quantise_as(AutoModelForCausalLM.from_config(config, **common), record)
    folder = _folder_of(path, revision)
    _load_weights(model, folder, dtype)
    if adapter := read_peft(folder / FOLDER):
        put_corrections(model, adapter)
        train_corrections_alone(model)
    return model


def refuse_quantised(config: Any, path: str) -> None:
    """ValueError if `path` holds one of our quantised students: as a plain model it would compute something else."""
    record = read_record(config, path)
    if record is not None:
        raise ValueError(
            f"it holds a student quantised with {record.quantiser}, but student.quantiser is none: set "
            f"student.quantiser={record.quantiser}"
        )


def recorded(config: Any, path: str) -> Record | None:
    """How the checkpoint is quantised, None for full precision. Removes `quantization_config` from the config."""
    if hasattr(config, "student_packing"):  # of an export of format packed
        raise ValueError(
            f"{path} holds packed weights: their latent weights are gone, so they cannot be trained; use the export "
            "of format 'hf'"
        )
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        quantisation = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        del config.quantization_config
    foreign = (quantiser.foreign_record(config, quantisation, path) for quantiser in QUANTISERS.values())
    found = next((record for record in foreign if record is not None), None)
    if quantisation is not None and found is None:
        method = quantisation.get("quant_method")
        raise ValueError(f"{path} is quantised with '{method}': a student needs latent weights, use the original")
    # Our own entry has more details than what an export says for other software.
    record = read_record(config, path) or found
    if record is not None and record.quantiser not in QUANTISERS:
        known = ", ".join(QUANTISERS)
        raise ValueError(f"{path} is quantised with {record.quantiser}, expected one of: {known}")
    return record


def _folder_of(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors", f"{FOLDER}/*"]))


def _load_weights(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Fill the model from the folder's safetensors. Only a head may be missing, and only a head may be left over."""
    weights = {name: tensor.to(dtype) for name, tensor in _read_safetensors(folder).items()}
    try:
        outcome = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # what torch raises if a shape differs
        raise ValueError(f"{folder} does not fit the model: {error}") from None
    model.tie_weights()
    inside = f"{model.base_model_prefix}."
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [n for n in outcome.missing_keys if not n.endswith(BLEND) and n not in tied]
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
            raise ValueError(f"{folder}: the weights file {name} is missing")
        tensors |= load_file(folder / name)
    return tensors
