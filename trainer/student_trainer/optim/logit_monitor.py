"""The largest attention logit of each head over the micro batches of a step. Watched by the loop, read by `qk_clip`.

The logits are those of the student's own forward pass: of its query and key after RoPE, any QK-norm and any
quantiser, under the mask that attention is given, documents included. They are computed once more beside whatever
kernel attends, a tile at a time: one product of query and key, and no array of [T, T].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.optim.logit_tiles import Visibility, largest_logits
from student_trainer.students.attention_hook import AttentionHook, attention_modules


class LogitMonitor:
    """`with monitor.watch(valid_BT): model(...)` around each forward pass, `largest()` after the last, then `reset()`.

    Leave the block before the backward pass, or checkpointed layers are measured twice, to the same result. Not for
    passes that read a key-value cache. Raises ValueError for a model whose attention transformers does not dispatch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = attention_modules(model)
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no attention that transformers dispatches: no logits to see")
        self._hooks = [AttentionHook(module, self._note) for module in self.layers.values()]
        self._largest: dict[int, Tensor] = {}
        self._valid_BT: Tensor | None = None
        # By the mask's identity: layers of a kind share one. The Visibility keeps the mask, and so its identity, alive.
        self._visibility: dict[tuple[int, bool], Visibility] = {}

    @contextmanager
    def watch(self, valid_BT: Tensor | None = None) -> Iterator[LogitMonitor]:
        """Measure what runs inside. `valid_BT`: False where the row holds padding, whose logits mean nothing."""
        attached: list[AttentionHook] = []
        self._valid_BT = valid_BT
        try:
            for hook in self._hooks:
                hook.attach()
                attached.append(hook)
            yield self
        finally:
            for hook in attached:
                hook.detach()
            self._valid_BT = None
            self._visibility.clear()

    def largest(self, group: Any = None) -> dict[int, Tensor]:
        """By layer, the largest logit of each query head since the last reset: float32 [H], -inf where none was seen.

        `group`: a process group over whose ranks to take the maximum as well; then every rank must call.
        """
        layers = sorted(self._largest)
        found = [self._largest[layer] for layer in layers]
        if group is not None and found:
            together = torch.cat(found)
            # The heads of all layers in one message; every rank saw other micro batches of the same step.
            torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, group)
            found = list(together.split([len(largest_H) for largest_H in found]))
        return {layer: largest_H.clone() for layer, largest_H in zip(layers, found, strict=True)}

    def reset(self) -> None:
        """Forget the step's logits."""
        self._largest.clear()

    @torch.compiler.disable
    @torch.no_grad()
    def _note(
        self, module: Any, query_BHTd: Tensor, key_BKTd: Tensor, value_BKTd: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        length, width = query_BHTd.shape[2:]
        if key_BKTd.shape[2] != length:
            raise ValueError(
                f"attention logits: {length} queries for {key_BKTd.shape[2]} keys, expected as many; "
                "run the pass with use_cache=False"
            )
        # As attention itself: 1 / sqrt(d) where the model gives no scale of its own.
        scaling = width**-0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        largest_H = largest_logits(query_BHTd, key_BKTd, self._seen(module, query_BHTd, mask, kwargs), scaling)
        before_H = self._largest.get(module.layer_idx)
        self._largest[module.layer_idx] = largest_H if before_H is None else torch.maximum(before_H, largest_H)

    def _seen(self, module: Any, query_BHTd: Tensor, mask: Any, kwargs: dict[str, Any]) -> Visibility:
        causal = kwargs.get("is_causal")
        causal = bool(module.is_causal if causal is None else causal)
        key = (id(mask), causal)
        if key not in self._visibility:
            length, device = query_BHTd.shape[2], query_BHTd.device
            self._visibility[key] = Visibility(mask, causal, self._valid_BT, length, device)
        return self._visibility[key]
