"""Reads what a model's folder says about the model. Called by `load`, and by `checkpoint.earlier_run` to find out what
kind of student a folder holds.

Other trainers of block-diffusion models record that in their own ways; it becomes the entry `diffusion` of our config,
and a log message says so. The known ones, by what identifies them:

    SDAR                    model_type sdar in config.json; block_size, mask_token_id
    Fast-dLLM v2            model_type Fast_dLLM_Qwen, or bd_size, in config.json; the mask token in the tokenizer
    dlm_config.json with
      bd_size               Fast-dLLM v2's training; mask_token_id
      training_method       fast-dllm-v2 predicts from the row before, unified-dlm in place; mask_token_id, no blocks
      block_size            a conversion for Fast-dLLM; the mask token in the tokenizer, is_bitnet

SDAR and Fast-dLLM v2 compute what Qwen3 and Qwen2 do, with other attention masks: their folders are read as those
models, and none of their code is run.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from student_trainer.settings.student import DiffusionSettings
from student_trainer.students.diffusion_record import (
    NEW_MODEL,
    DiffusionRecord,
    Family,
    read_diffusion,
    write_diffusion,
)
from student_trainer.students.pretrained import recorded

DLM_FILE = "dlm_config.json"
BASES = {"sdar": ("qwen3", "Qwen3ForCausalLM"), "Fast_dLLM_Qwen": ("qwen2", "Qwen2ForCausalLM")}
SDAR_BLOCK, SDAR_MASK = 4, 151669  # SDAR's 4B folder leaves them out
METHODS: dict[str, Family] = {
    "unified-dlm": "in_place", "fast-dllm-v2": "token_shift", "fast-dllm-v2-sft": "token_shift"
}  # fmt: skip
MASK_TOKENS = ("|<MASK>|", "<|MASK|>", "<|mask|>", "<MASK>", "<mask>", "[MASK]")
# Fields of config.json that the entry replaces.
SAID = (
    "model_type",
    "architectures",
    "auto_map",
    "block_size",
    "bd_size",
    "mask_token_id",
    "is_dlm",
    "num_diffusion_steps",
)

log = logging.getLogger(__name__)


def read_config(path: str, revision: str | None = None, wanted: DiffusionSettings | None = None) -> Any:
    """The model's config, with our entry `diffusion` for a block-diffusion model of any known trainer.

    `wanted` fills in what such a folder does not say. ValueError for one that cannot be read, OSError if there is none.
    """
    from transformers import AutoConfig, PretrainedConfig

    plain, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    given = _dlm_file(path, revision)
    base = BASES.get(str(plain.get("model_type")))
    ours = "diffusion" in plain
    foreign = base is not None or given is not None or "bd_size" in plain or bool(plain.get("is_dlm"))
    if ours or not foreign:
        return AutoConfig.from_pretrained(path, revision=revision)
    record = _record(path, revision, plain, given or {}, wanted or DiffusionSettings())
    kind, architecture = base or (str(plain.get("model_type")), None)
    rest = {name: value for name, value in plain.items() if name not in SAID}
    if architecture is None:
        rest["architectures"] = plain.get("architectures")
    config = AutoConfig.for_model(kind, **{**rest, **({"architectures": [architecture]} if architecture else {})})
    write_diffusion(config, record)
    return config


def kind_of(path: str, revision: str | None, wanted: DiffusionSettings | None = None) -> tuple[str, str, str]:
    """What a folder holds: the architecture and the quantiser of a student, and a description in words."""
    config = read_config(path, revision, wanted)
    diffusion, quantised = read_diffusion(config, path), recorded(config, path)
    bits = (_dlm_file(path, revision) or {}).get("is_bitnet") is True
    architecture = "causal" if diffusion is None else "diffusion"
    quantiser = quantised.quantiser if quantised is not None else "bitnet" if bits else "none"
    words = "reads from left to right" if diffusion is None else f"fills in blocks of {diffusion.block_size}"
    weights = "in full precision" if quantiser == "none" else f"quantised with {quantiser}"
    return architecture, quantiser, f"a {config.model_type} model that {words}, {weights}"


def _dlm_file(path: str, revision: str | None) -> dict[str, Any] | None:
    """The contents of `dlm_config.json`, None if there is none. ValueError if it can't be read."""
    from transformers.utils.hub import cached_file

    file = Path(path) / DLM_FILE
    if not Path(path).is_dir():
        found = cached_file(
            path, DLM_FILE, revision=revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        file = Path(found) if found else file
    if not file.is_file():
        return None
    try:
        given = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: its {DLM_FILE} is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: its {DLM_FILE} holds {type(given).__name__}, expected an object of names and values")
    return given


def _record(
    path: str, revision: str | None, plain: dict[str, Any], given: dict[str, Any], wanted: DiffusionSettings
) -> DiffusionRecord:
    """From config.json and dlm_config.json. ValueError if they contradict each other, or if no mask token is named."""
    sdar = plain.get("model_type") == "sdar"
    blocks = {
        f"{name} of {file}": fields[name]
        for file, fields in ((DLM_FILE, given), ("config.json", plain))
        for name in ("bd_size", "block_size")
        if fields.get(name) is not None
    }
    if len(set(map(repr, blocks.values()))) > 1:
        raise ValueError(
            f"{path}: {', '.join(f'{name} is {size}' for name, size in blocks.items())}: expected one size"
        )
    family = "in_place" if sdar else _family(path, given)
    block = next(iter(blocks.values()), SDAR_BLOCK if sdar else wanted.block_size or NEW_MODEL["block_size"])
    named = given.get("mask_token_id", plain.get("mask_token_id"))
    if named is None:
        named = SDAR_MASK if sdar else wanted.mask_token_id
    mask, where = (named, "") if named is not None else _mask_token(path, revision)
    try:
        record = DiffusionRecord(block, mask, family, "block_causal")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a block-diffusion model: {error}") from None
    log.info(
        "%s is a block-diffusion model of another trainer: blocks of %d%s, mask token %d%s, %s", path, block,
        "" if blocks or sdar else " (which it does not specify)", mask, where, family,
    )  # fmt: skip
    return record


def _family(path: str, given: dict[str, Any]) -> Family:
    """Which row predicts a token: as in Fast-dLLM, unless another training method is named."""
    method = given.get("training_method", "fast-dllm-v2")
    if method not in METHODS:
        raise ValueError(
            f"{path}: training_method in its {DLM_FILE} is {method!r}, expected one of {', '.join(METHODS)}: it "
            "determines which row predicts a token"
        )
    return METHODS[method]


def _mask_token(path: str, revision: str | None) -> tuple[int, str]:
    """The mask token that the tokenizer names, and words for the log. ValueError if it names none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {path}, which would name its mask token: {error}") from None
    known = tokenizer.get_vocab()
    token = next((each for each in (tokenizer.mask_token, *MASK_TOKENS) if each in known), None)
    if token is None:
        raise ValueError(
            f"{path} is a block-diffusion model without a mask token: neither mask_token_id in config.json or "
            f"{DLM_FILE}, nor a token of its tokenizer ({', '.join(MASK_TOKENS)}); set student.diffusion.mask_token_id"
        )
    return int(known[token]), f" ({token} of its tokenizer)"
