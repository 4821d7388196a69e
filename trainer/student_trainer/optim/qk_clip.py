"""QK-clip: after an update, scales attention heads whose largest logit exceeded a threshold back to it. Used by
`optimizer`, which the loop calls once per step.

From Kimi K2 (arXiv 2507.20534): with S the largest logit of a head and gamma = min(1, tau / S), its query is scaled by
gamma^alpha and its key by gamma^(1 - alpha), and so the logit by gamma. Query heads that share a key head take the
smallest gamma among them, so that no weight ever grows. `qk_layers` says what is scaled in which kind of layer.

The logits are those of the student's own forward pass: from its query and key after RoPE, any QK-norm and any
quantiser, under the mask that attention is given, documents included. They are computed again, besides the kernel that
attends, tile by tile (`logit_tiles`): one product of query and key, and no array of [T, T].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.optim.logit_tiles import Visibility, largest_logits
from student_trainer.optim.qk_layers import Layer, plan_layer
from student_trainer.students.attention_hook import AttentionHook, attention_modules


class LogitMonitor:
    """`with monitor.watch(valid_BT): model(...)` around each forward pass, `largest()` after the last, then `reset()`.

    Leave the block before the backward pass, or checkpointed layers are measured twice, with the same result. Not for
    passes that read a key-value cache. Raises ValueError for a model whose attention transformers does not dispatch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = attention_modules(model)
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no attention that transformers dispatches: no logits to read")
        self._hooks = [AttentionHook(module, self._note) for module in self.layers.values()]
        self._largest: dict[int, Tensor] = {}
        self._valid_BT: Tensor | None = None
        # By the mask's identity: layers of a kind share one. The Visibility keeps the mask, and so its identity, alive.
        self._visibility: dict[tuple[int, bool], Visibility] = {}

    @contextmanager
    def watch(self, valid_BT: Tensor | None = None) -> Iterator[LogitMonitor]:
        """Measure what runs inside. `valid_BT`: False at padding, whose logits mean nothing."""
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

        `group`: a process group over whose ranks the maximum is taken too; then every rank must call.
        """
        layers = sorted(self._largest)
        found = [self._largest[layer] for layer in layers]
        if group is not None and found:
            together = torch.cat(found)
            # All layers' heads in one message; every rank saw other micro batches of the same step.
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
                f"attention logits: {length} queries for {key_BKTd.shape[2]} keys, expected the same number; "
                "run the pass with use_cache=False"
            )
        # As in attention itself: 1 / sqrt(d) if the model gives no scale of its own.
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


@dataclass(frozen=True)
class ClipReport:
    """What a clip saw and did. `largest_logit`: over all heads, before the clip; -inf if none was seen.
    `clipped_heads`: query heads that were scaled. `smallest_factor`: the smallest gamma, 1 if nothing was scaled."""

    largest_logit: float
    clipped_heads: int
    smallest_factor: float


class QKClip:
    """Made for a model before it is sharded. `with clip.monitor.watch(valid_BT)` around the forward pass of each micro
    batch, `apply` after the update. Keeps nothing from one step to the next.

    `tau`: the largest logit allowed. `alpha`: the query's share of the scaling, 0 to 1.
    Warns of layers where it can do nothing: fused or frozen projections, a QK-norm without gains.
    """

    def __init__(self, model: nn.Module, tau: float = 100.0, alpha: float = 0.5) -> None:
        if not (math.isfinite(tau) and tau > 0):
            raise ValueError(f"qk_clip: got tau {tau}, expected a number above 0")
        if not 0 <= alpha <= 1:
            raise ValueError(f"qk_clip: got alpha {alpha}, expected a number from 0 to 1")
        self.tau = tau
        self.alpha = alpha
        self.monitor = LogitMonitor(model)
        self._layers: dict[int, Layer] = {}
        helpless: dict[str, list[int]] = {}
        for number, module in self.monitor.layers.items():
            try:
                self._layers[number] = plan_layer(module)
            except ValueError as error:
                helpless.setdefault(str(error), []).append(number)
        for reason, numbers in helpless.items():
            warnings.warn(f"qk_clip has no effect in layers {', '.join(map(str, numbers))}: {reason}", stacklevel=2)

    def apply(self, group: Any = None) -> ClipReport:
        """Scale the heads that the monitor saw exceed tau, and reset it.

        `group`: the process group whose ranks saw the step's other micro batches; then all of them must call.
        Raises ValueError if a logit is NaN or infinite; nothing is scaled then.
        """
        largest = {layer: largest_H.tolist() for layer, largest_H in self.monitor.largest(group).items()}
        self.monitor.reset()
        for layer, heads in largest.items():
            if any(math.isnan(logit) or logit == math.inf for logit in heads):
                raise ValueError(f"qk_clip: the attention logits of layer {layer} are no longer finite: {heads}")
        # Only heads above tau; for the rest gamma is 1 and their weights are not touched.
        gammas = [gamma for layer, heads in largest.items() for gamma in self._clip(layer, heads) if gamma < 1.0]
        top = max((logit for heads in largest.values() for logit in heads), default=-math.inf)
        return ClipReport(top, len(gammas), min(gammas, default=1.0))

    def _clip(self, number: int, largest: list[float]) -> list[float]:
        """Scale a layer, given the largest logit of each head. Returns the factor of each query head's logits."""
        # gamma = tau / largest logit: with q scaled by gamma^alpha and k by gamma^(1 - alpha), the largest is tau.
        gammas = [self.tau / logit if logit > self.tau else 1.0 for logit in largest]
        layer = self._layers.get(number)
        if layer is None or min(gammas) == 1.0:
            return [1.0] * len(gammas)
        if layer.group is None:
            # A quantised matrix, or one norm for all heads, has a single scale: the smallest that any head needs.
            query = key = [min(gammas)]
        else:
            # Query heads share a key head, which can only be scaled by one number.
            key = [min(gammas[start : start + layer.group]) for start in range(0, len(gammas), layer.group)]
            query = [gamma for gamma in key for _ in range(layer.group)]
        # logit = q k / sqrt(d) is linear in both q and k, so the two factors multiply to gamma.
        layer.query.scale([gamma**self.alpha for gamma in query])
        layer.key.scale([gamma ** (1.0 - self.alpha) for gamma in key])
        return query if layer.group is not None else query * len(gammas)
