"""Q, K and V of one layer, taken from the student's own forward pass. Entered by the loop around that pass.

Every attention layer of transformers hands its query and key (after RoPE and any QK-norm) and its raw value to a
function that it looks up by `config._attn_implementation`. `AttentionStates` gives one layer a copy of the config
that names our function there: it notes the three tensors and calls the implementation that was configured. So flash
and SDPA attention run as they are, no map is ever built, and the other layers never know.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from teacher_proto.relations import QKV

IMPLEMENTATION = "stillhouse_states"
_RECORDER = "_stillhouse_recorder"


class AttentionStates:
    """Around one forward pass: `with AttentionStates(model, layer) as states: model(...)`, then `states.take()`.

    `layer` counts from 0. Works with gradient checkpointing of the non-reentrant kind, which transformers uses by
    default. Leave the block before the backward pass. Not for passes that read a key-value cache.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model = model
        self.layer = layer
        self._module = attention_module(model, layer)
        self._states: QKV | None = None
        self._open = False
        self._attend: Callable[..., Any] | None = None

    def __enter__(self) -> AttentionStates:
        module = self._module
        if _RECORDER in module.__dict__:
            raise ValueError(f"the attention states of layer {self.layer} are being taken already")
        self._original_config = module.config
        self._attend = _implementation(module)
        recording_config = copy.copy(module.config)
        recording_config._attn_implementation = IMPLEMENTATION
        module.config = recording_config
        module.__dict__[_RECORDER] = self
        self._states, self._open = None, True
        return self

    def __exit__(self, *exception: object) -> None:
        self._module.config = self._original_config
        del self._module.__dict__[_RECORDER]

    def take(self) -> QKV:
        """query [B, T, H, dh], key and value [B, T, H_kv, dh], part of the autograd graph. Once for each pass."""
        if self._states is None:
            raise ValueError(
                f"no attention states of layer {self.layer}: run the model's forward pass in the block first"
            )
        states, self._states = self._states, None
        if torch.is_grad_enabled() and self.model.training and not states.query.requires_grad:
            raise ValueError(
                f"the attention states of layer {self.layer} carry no gradient: layers up to it must be trainable, and "
                "gradient checkpointing needs use_reentrant=False"
            )
        return states

    def _note(self, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor) -> None:
        if not self._open:  # a checkpointed layer runs again in the backward pass
            return
        if query_BHTd.shape[2] != key_BHTd.shape[2]:
            raise ValueError(
                f"attention states: {query_BHTd.shape[2]} queries for {key_BHTd.shape[2]} keys, expected as many; "
                "run the pass with use_cache=False"
            )
        self._states = QKV(query_BHTd.transpose(1, 2), key_BHTd.transpose(1, 2), value_BHTd.transpose(1, 2))
        self._open = False


def attention_module(model: nn.Module, layer: int) -> Any:
    """The attention module of layer `layer`. ValueError where the model has no such layer or is not built that way."""
    found = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) == layer and hasattr(module, "is_causal") and hasattr(module, "config")
    ]
    if len(found) != 1:
        known = sorted(
            {
                module.layer_idx
                for module in model.modules()
                if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
            }
        )
        has = f"layers {known[0]} to {known[-1]}" if known else "no attention layers that transformers dispatches"
        raise ValueError(f"attention layer {layer}: {type(model).__name__} has {has}")
    return found[0]


def _implementation(module: Any) -> Callable[..., Any]:
    """What the layer would have called: a registered function, or its modelling file's own eager one."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    if implementation is None:
        raise ValueError(f"{type(module).__name__} does not dispatch its attention: its states cannot be taken")
    return implementation


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    recorder: AttentionStates = module.__dict__[_RECORDER]
    recorder._note(query, key, value)
    assert recorder._attend is not None
    return recorder._attend(module, query, key, value, *args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _record)
