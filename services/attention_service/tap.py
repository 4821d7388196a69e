"""Captures what attention layers are given in a model's own forward pass, which ends at the highest layer wanted.

Every attention layer of transformers passes its query and key (after RoPE and any norm of theirs), its value and its
mask to a function that it looks up by `config._attn_implementation`. Each layer here gets a copy of the config that
names ours: it captures what is wanted, and calls the original if the pass continues. Used by `model.py`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_NAME = "stillhouse_tapped"
_TAP = "_stillhouse_tap"


@dataclass(frozen=True)
class Attended:
    """What one layer attends with: query [B, H, T, d], key and value [B, G, T, d], the mask that it was given (None:
    causal), and the scaling and soft cap of its logits."""

    query_BHTd: Tensor
    key_BGTd: Tensor
    value_BGTd: Tensor
    mask: Tensor | None
    scaling: float
    soft_cap: float | None


class _Taken(Exception):
    pass


class Tap:
    """Installed on a model permanently. One pass at a time."""

    def __init__(self, model: nn.Module):
        self._wanted: frozenset[int] = frozenset()
        self._taken: dict[int, Attended] = {}
        self.modules: dict[int, Any] = {}
        self.attend: dict[int, Callable[..., Any]] = {}
        for module in model.modules():
            layer = getattr(module, "layer_idx", None)
            if layer is None or not hasattr(module, "is_causal") or not hasattr(module, "config"):
                continue
            if layer in self.modules:
                raise ValueError(f"a {type(model).__name__} has two attention modules for layer {layer}")
            self.modules[layer], self.attend[layer] = module, _configured(module)
            module.config = copy.copy(module.config)
            module.config._attn_implementation = _NAME
            module.__dict__[_TAP] = self

    def take(self, forward: Callable[[], Any], layers: Collection[int]) -> dict[int, Attended]:
        """Run `forward` up to the highest of `layers`; returns what each of them attends with."""
        self._wanted, self._taken = frozenset(layers), {}
        try:
            forward()
        except _Taken:
            pass
        finally:
            taken, self._taken = self._taken, {}
        assert taken.keys() == self._wanted, f"got layers {sorted(taken)}, expected {sorted(self._wanted)}"
        return taken

    def meet(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Called as a layer's attention, in the middle of a pass."""
        layer = module.layer_idx
        if layer in self._wanted:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            self._taken[layer] = Attended(query, key, value, mask, scaling, kwargs.get("softcap"))
            if len(self._taken) == len(self._wanted):
                raise _Taken
        return self.attend[layer](module, query, key, value, mask, *args, **kwargs)


def _configured(module: Any) -> Callable[..., Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    if implementation is None:
        raise ValueError(f"a {type(module).__name__} does not dispatch its attention: its states cannot be captured")
    return implementation


def _dispatch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    return module.__dict__[_TAP].meet(module, query, key, value, mask, *args, **kwargs)


AttentionInterface.register(_NAME, _dispatch)
