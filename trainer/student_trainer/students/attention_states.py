"""Q, K and V of one layer, taken from the student's own forward pass. Entered by the loop around that pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.students.attention_hook import AttentionHook, attention_module
from teacher_proto.relations import QKV


class AttentionStates:
    """Around one forward pass: `with AttentionStates(model, layer) as states: model(...)`, then `states.take()`.

    `layer` counts from 0. Works with gradient checkpointing of the non-reentrant kind, which transformers uses by
    default. Leave the block before the backward pass. Not for passes that read a key-value cache.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model = model
        self.layer = layer
        self._hook = AttentionHook(attention_module(model, layer), self._note)
        self._states: QKV | None = None
        self._open = False

    def __enter__(self) -> AttentionStates:
        self._hook.attach()
        self._states, self._open = None, True
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.detach()

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

    def _note(
        self, module: Any, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        if not self._open:  # a checkpointed layer runs again in the backward pass
            return
        if query_BHTd.shape[2] != key_BHTd.shape[2]:
            raise ValueError(
                f"attention states: {query_BHTd.shape[2]} queries for {key_BHTd.shape[2]} keys, expected as many; "
                "run the pass with use_cache=False"
            )
        self._states = QKV(query_BHTd.transpose(1, 2), key_BHTd.transpose(1, 2), value_BHTd.transpose(1, 2))
        self._open = False
