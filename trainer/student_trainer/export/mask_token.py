"""Names a diffusion student's mask token in the tokenizer that goes with it. Called by the exporters."""

from __future__ import annotations

import copy
from typing import Any

NAME = "<|MASK|>"


def with_mask_token(tokenizer: Any, mask: int) -> tuple[Any, str]:
    """A copy of the tokenizer whose mask token is row `mask`, and no words; or the tokenizer as it is, and why not.

    A tokenizer gives a token that it learns the next id, so it can name the row behind its last one alone.
    """
    from transformers import AddedToken

    named = copy.deepcopy(tokenizer)
    if mask < len(named):
        named.mask_token = named.convert_ids_to_tokens(mask)
    elif NAME in named.get_vocab():
        return tokenizer, f"its {NAME} is token {named.get_vocab()[NAME]}"
    elif mask > len(named):
        return tokenizer, f"it has {len(named)} tokens and can't number one {mask}"
    else:
        named.add_special_tokens({"mask_token": AddedToken(NAME, special=True)})
    return named, ""
