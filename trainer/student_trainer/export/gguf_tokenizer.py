"""A Hugging Face tokenizer as GGUF metadata. Called by `gguf`.

GGUF holds the vocabulary and merges of a byte-level BPE, but only the *name* of its pre-tokeniser: llama.cpp has the
regular expressions built in. So the name is looked up by the tokenizer's rules, and rules without a name are refused.
"""

from __future__ import annotations

import json
from typing import Any

# The rules that split text before BPE -> llama.cpp's name. "gpt2" stands for ByteLevel's own regular expression.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENISERS = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
}
SPECIAL = {
    "bos_token_id": "add_bos_token_id",
    "eos_token_id": "add_eos_token_id",
    "unk_token_id": "add_unk_token_id",
    "pad_token_id": "add_pad_token_id",
}


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write the tokenizer's fields; for None, write that there is none.

    ValueError if it is not a fast byte-level BPE, or if its pre-tokeniser has no known name in llama.cpp.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"gguf: {type(tokenizer).__name__} is not a fast tokenizer, its rules cannot be read; pass no tokenizer"
        )
    rules = json.loads(backend.to_str())
    pre = pre_tokeniser_name(rules)
    tokens, kinds = _tokens(rules, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in rules["model"]["merges"]])
    for name, method in SPECIAL.items():
        if getattr(tokenizer, name, None) is not None:
            getattr(writer, method)(getattr(tokenizer, name))
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokeniser_name(rules: dict[str, Any]) -> str:
    """llama.cpp's name for the rules of a tokenizer.json. ValueError names the rules if there is none."""
    if rules["model"]["type"] != "BPE" or rules["model"].get("byte_fallback"):
        raise ValueError(
            f"gguf: the tokenizer is a {rules['model']['type']} model, expected byte-level BPE; pass no tokenizer"
        )
    steps = rules.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    signature = tuple(part for step in steps if (part := _signature(step)) is not None)
    if signature not in PRE_TOKENISERS:
        raise ValueError(f"gguf: no llama.cpp name is known for the pre-tokeniser {signature}; pass no tokenizer")
    return PRE_TOKENISERS[signature]


def _signature(step: dict[str, Any]) -> str | None:
    if step.get("type") == "ByteLevel":
        return "gpt2" if step.get("use_regex", True) else None
    if step.get("type") == "Digits" and step["individual_digits"]:
        return "digits"
    if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _tokens(rules: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token texts by id and their GGUF types; ids that the tokenizer lacks are marked as unused. ValueError if it has
    ids beyond `vocab_size`.
    """
    import gguf

    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [int(gguf.TokenType.UNUSED)] * vocab_size
    added = {token["id"]: token for token in rules["added_tokens"]}
    largest = max([*rules["model"]["vocab"].values(), *added])
    if largest >= vocab_size:
        raise ValueError(f"gguf: the tokenizer has id {largest}, but the model's vocabulary has {vocab_size} entries")
    for text, index in rules["model"]["vocab"].items():
        tokens[index], kinds[index] = text, int(gguf.TokenType.NORMAL)
    for index, token in added.items():
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[index], kinds[index] = token["content"], int(kind)
    return tokens, kinds
