"""What identifies a student besides its weights: its model's config and its tokenizer. These are read from
`student.checkpoint_path` and are not among a checkpoint's tensors. Made by `build`, kept in checkpoints, compared by
`resume`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import transformers

from teacher_proto.identity import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fields of a config that say how the model is run here, not what it computes.
HOW_IT_RUNS = {
    "dtype", "torch_dtype", "use_cache", "transformers_version", "output_attentions", "output_hidden_states",
    "return_dict",
}  # fmt: skip
# Fields of a tokenizer that calls set, not what the tokenizer is.
SET_BY_CALLS = {"truncation", "padding", "version"}


def student_identity(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Both as plain JSON values: every field that decides what is computed, long ones as their sha256.

    `transformers`: its version; another version may know more fields of the same model.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in HOW_IT_RUNS and not k.startswith("_")}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {
        "transformers": transformers.__version__,
        "config": {**config, "generation_eos_token_id": ends},
        "tokenizer": _tokenizer(tokenizer),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    vocabulary = {int(index): token for token, index in tokenizer.get_vocab().items()}
    found: dict[str, Any] = {
        "tokens": len(vocabulary),
        "vocabulary_sha256": digest([[index, vocabulary[index]] for index in sorted(vocabulary)]),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template_sha256": digest(tokenizer.chat_template) if tokenizer.chat_template else None,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return found | {"class": type(tokenizer).__name__}
    parts = {name: part for name, part in json.loads(backend.to_str()).items() if name not in SET_BY_CALLS}
    model = parts.pop("model")
    found["added_tokens_sha256"] = digest(parts.pop("added_tokens"))
    found["merges_sha256"] = digest(model.pop("merges", None))
    model.pop("vocab", None)  # above, with the added tokens
    return found | parts | {"model": model}
