"""Hooks that see the inputs of attention layers during the model's own forward pass. Used by `capture` and by
`optim.qk_clip`.

Every attention layer of transformers passes its query and key (after RoPE and any QK-norm) and its raw value to a
function that it looks up by `config._attn_implementation`. A hooked layer gets a copy of the config that names our
function: it passes the tensors to every hook and calls the implementation that was configured. So flex and SDPA
attention run unchanged, no attention map is ever built, and other layers are not affected.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

IMPLEMENTATION = "stillhouse_hooked"
_HOOKED = "_stillhouse_hooked"


class _Hooked:
    """What a layer had before it was hooked, and its hooks."""

    def __init__(self, module: Any) -> None:
        self.config = module.config
        self.attend = configured_attention(module)
        self.hooks: list[AttentionHook] = []


class AttentionHook:
    """Between `attach` and `detach`, calls `note(module, query_BHTd, key_BHTd, value_BHTd, mask, kwargs)` each time
    before the layer attends. A layer can have several hooks at a time.

    `mask` and `kwargs` (`scaling` among them) are what the layer passes besides the states.
    """

    def __init__(self, module: Any, note: Callable[[Any, Tensor, Tensor, Tensor, Any, dict[str, Any]], None]) -> None:
        self.module = module
        self.note = note

    def attach(self) -> None:
        hooked = self.module.__dict__.get(_HOOKED)
        if hooked is None:
            hooked = _Hooked(self.module)
            # A copy for this layer only: all layers share one config, and the others keep their attention.
            config = copy.copy(self.module.config)
            config._attn_implementation = IMPLEMENTATION
            self.module.config = config
            self.module.__dict__[_HOOKED] = hooked
        assert self not in hooked.hooks, "this hook is already attached"
        hooked.hooks.append(self)

    def detach(self) -> None:
        hooked = self.module.__dict__[_HOOKED]
        hooked.hooks.remove(self)
        if not hooked.hooks:
            self.module.config = hooked.config
            del self.module.__dict__[_HOOKED]


def attention_modules(model: nn.Module) -> dict[int, Any]:
    """The attention modules that transformers dispatches, by layer, counted from 0."""
    modules: dict[int, Any] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        # A module with these three attributes is one that transformers dispatches by its config.
        if layer is None or not hasattr(module, "is_causal") or not hasattr(module, "config"):
            continue
        if layer in modules:
            raise ValueError(
                f"{type(model).__name__} has two attention modules of layer {layer}, expected a decoder-only model"
            )
        modules[layer] = module
    return dict(sorted(modules.items()))


def attention_module(model: nn.Module, layer: int) -> Any:
    """The attention module of layer `layer`. ValueError if the model has no such layer or is not built that way."""
    modules = attention_modules(model)
    if layer not in modules:
        known = list(modules)
        has = f"layers {known[0]} to {known[-1]}" if known else "no attention layers that transformers dispatches"
        raise ValueError(f"attention layer {layer}: {type(model).__name__} has {has}")
    return modules[layer]


def configured_attention(module: Any) -> Callable[..., Any]:
    """The function that the layer calls: a registered one, or the eager one of its modelling file."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    if implementation is None:
        raise ValueError(f"{type(module).__name__} does not dispatch its attention: its states cannot be taken")
    return implementation


def _dispatch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    hooked: _Hooked = module.__dict__[_HOOKED]
    # The hooks see the states as attention gets them; the configured kernel then attends as usual.
    for hook in hooked.hooks:
        hook.note(module, query, key, value, attention_mask, kwargs)
    return hooked.attend(module, query, key, value, attention_mask, *args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _dispatch)
