"""Captures the states of a forward pass that terms of the loss compare; no term does so itself. Used by `student`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.losses.terms import Capture, Captured
from student_trainer.students.attention_hook import AttentionHook, attention_module
from teacher_proto.compute.relations import QKV

# What comes after the states in an attention module, by transformers' names.
OUTPUT_PARTS = ("o_proj", "out_proj", "c_proj", "dense", "attn_sub_norm", "sinks")


@contextmanager
def capturing(model: Any, wanted: Capture) -> Iterator[Callable[[Tensor], Captured]]:
    """Around the student's forward pass; yields a function from the final hidden rows to the record, to call once."""
    with ExitStack() as stack:
        states = {
            layer: stack.enter_context(AttentionStates(model, layer)) for layer in sorted(wanted.attention)
        }  # fmt: skip
        # The states stay part of the graph: their term's gradient flows back through the layers below.
        yield lambda hidden_ND: Captured(hidden_ND, {layer: each.take() for layer, each in states.items()})


def check_capture(model: nn.Module, wanted: Capture) -> None:
    """ValueError if the model lacks what is to be captured."""
    for layer in wanted.attention:
        attention_module(model, layer)


def parameters_behind(model: nn.Module, wanted: Capture) -> list[Tensor]:
    """The parameters that produce the captured states: whatever terms on these have in common with other terms is here
    and below. All trained ones if none of these is trained, as with an adapter on the MLPs. Empty if only the final
    hidden rows are captured.
    """
    made = []
    for layer in sorted(wanted.attention):
        named = attention_module(model, layer).named_parameters()
        made += [each for name, each in named if each.requires_grad and not name.startswith(OUTPUT_PARTS)]
    if wanted.attention and not made:
        made = [each for each in model.parameters() if each.requires_grad]
    return made


class AttentionStates:
    """Q, K and V of one layer: `with AttentionStates(model, layer) as states: model(...)`, then `states.take()`.

    `layer` is counted from 0. Works with non-reentrant gradient checkpointing, which is transformers' default. Leave
    the block before the backward pass. Not for passes that read a key-value cache.
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
        """query [B, T, H, dh], key and value [B, T, H_kv, dh], part of the autograd graph. Once per pass."""
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
                f"attention states: {query_BHTd.shape[2]} queries for {key_BHTd.shape[2]} keys, expected the same "
                "number; run the pass with use_cache=False"
            )
        self._states = QKV(query_BHTd.transpose(1, 2), key_BHTd.transpose(1, 2), value_BHTd.transpose(1, 2))
        self._open = False
