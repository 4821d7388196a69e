"""Names a diffusion student's mask token in its tokenizer. Called by `folder` and `sdar`."""

from __future__ import annotations

import copy
from typing import Any

NAME = "<|MASK|>"


def with_mask_token(tokenizer: Any, mask: int) -> tuple[Any, str]:
    """A copy of the tokenizer whose mask token is id `mask`, and ""; or the unchanged tokenizer, and the reason.

    A tokenizer gives a new token the next free id, so the only new id that it can name is the one after its last.
    """
    from transformers import AddedToken

    named = copy.deepcopy(tokenizer)
    if mask < len(named):
        named.mask_token = named.convert_ids_to_tokens(mask)
    elif NAME in named.get_vocab():
        return tokenizer, f"its {NAME} is token {named.get_vocab()[NAME]}"
    elif mask > len(named):
        return tokenizer, f"it has {len(named)} tokens, so a new one can't get id {mask}"
    else:
        named.add_special_tokens({"mask_token": AddedToken(NAME, special=True)})
    return named, ""
