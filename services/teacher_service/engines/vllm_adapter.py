"""What runs inside vLLM: any causal language model with a token-wise pooler that makes target records.

Attribute `MODULE.CLASS` of this module is vLLM's class CLASS of MODULE, adapted. vLLM is given it by `vllm_options.py`;
its workers import it by name, through the option `model_class_overrides`. Only `vllm_process.py` imports it as well.

An exception in a pooler ends the engine, so requests are validated before they get here, and none is refused here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.v1.pool.metadata import PoolingMetadata

from teacher_proto.compute.reduction import reduce_rows
from teacher_proto.compute.slices import Slice, reduce_slices
from teacher_proto.requests import TargetSpec
from teacher_proto.wire.packed import RowLayout
from teacher_service.engines.vllm_messages import SPEC_FIELDS
from teacher_service.engines.vllm_ranks import SharedHead, shared_head
from teacher_service.engines.vllm_wrappers import weights_of

TASK = "token_classify"
# Called once the weights are loaded; `vllm_process.py` sets it, in its own process.
on_weights: Callable[[], None] | None = None
# vLLM measures its memory with requests that specify nothing: they are taken to request the most.
_PROFILE = TargetSpec(
    kinds=("top_k", "score", "sampled", "hidden"),
    top_k=256,
    temperatures=(2.0, 5.0),
    num_samples=64,
    hidden_dtype="float16",
)


def __getattr__(name: str) -> type:
    return adapted(name, TargetsPooler)


def adapted(name: str, pooler: type[TargetsPooler]) -> type:
    """Class MODULE.CLASS with a `pooler`, under its own name, so that whatever vLLM looks up by name still finds it.

    AttributeError if `name` is no such path, as a lookup of a module attribute must raise.
    """
    module, _, class_name = name.rpartition(".")
    if not module:
        raise AttributeError(name)
    base = getattr(importlib.import_module(module), class_name)

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        shared = shared_head(self, model.get_vocab_size())
        self.pooler = pooler(self.compute_logits, model.get_vocab_size(), model.get_hidden_size(), shared)
        self._checkpoint_config = model.hf_config

    def load_weights(self: Any, weights: Iterable[tuple[str, torch.Tensor]], **kwargs: Any) -> Any:
        loaded = base.load_weights(self, weights_of(self._checkpoint_config, weights), **kwargs)
        if on_weights is not None:
            on_weights()
        return loaded

    body = {
        "is_pooling_model": True, "default_tok_pooling_type": "ALL", "__init__": __init__, "load_weights": load_weights,
        "__module__": __name__,
    }  # fmt: skip
    return type(base.__name__, (base,), body)


class TargetsPooler(Pooler):
    """Packed rows of each request's wanted positions, gathered over the steps of a chunked prefill.

    A request whose first step begins after its first row, because vLLM found that in its prefix cache, gets no rows.
    `PoolingParams.extra_kwargs` is made by `vllm_messages.arguments`.
    """

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        vocab_size: int,
        hidden_size: int,
        shared: SharedHead | None = None,
    ):
        super().__init__()
        self.compute_logits = compute_logits
        self._shared = shared
        self._reduce: Callable[..., torch.Tensor | None] | None = None if shared else reduce_rows
        self._vocab_size = vocab_size
        self._hidden_size = hidden_size

    def get_supported_tasks(self) -> Set[Any]:
        return {TASK}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor | None]:
        """One tensor [rows, bytes] uint8 for each request that this step finished, None for the others."""
        cursor = pooling_metadata.get_pooling_cursor()
        counts = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        caches = [state.hidden_states_cache for state in pooling_metadata.pooling_states]
        groups: dict[RowLayout, list[tuple[int, Slice]]] = {}
        each = zip(hidden_states.split(counts), counts, ends, pooling_metadata.get_prompt_token_ids_cpu(), strict=True)
        for i, (hidden_ND, count, end, tokens_T) in enumerate(each):
            begin = end - count
            asked = pooling_metadata.pooling_params[i].extra_kwargs or {}
            first, last = asked.get("rows", (0, len(tokens_T)))
            # A preempted request starts over, with its rows in `caches`; one that reads the prefix cache starts late.
            start, stop = first + sum(map(len, caches[i])), min(last, end)
            if begin <= start < stop:  # else rows are missing that vLLM has cached: `vllm_process.py` retries
                ids_NG = _gather_ids(asked, start, stop)
                wanted = Slice(start, stop, hidden_ND[start - begin : stop - begin], tokens_T, ids_NG,
                               asked.get("sample_key", 0))  # fmt: skip
                groups.setdefault(self._layout(asked), []).append((i, wanted))
        self.shares_rows(hidden_states)
        reduce = self._reduce
        assert reduce is not None
        for layout, members in groups.items():
            packed = reduce_slices([wanted for _, wanted in members], self.compute_logits, layout, reduce)
            # A rank that returns nothing appends rows without bytes: every rank must know which rows are done.
            empty = [torch.empty((wanted.stop - wanted.start, 0), dtype=torch.uint8) for _, wanted in members]
            for (i, _), part in zip(members, packed or empty, strict=True):
                caches[i].append(part)
        return [_take(cache) if done else None
                for cache, done in zip(caches, cursor.get_finished_mask(), strict=True)]  # fmt: skip

    def shares_rows(self, like_ND: torch.Tensor) -> bool:
        """Whether the ranks of the head share its rows; determined once, by all of them in the same call.

        `like_ND` has the hidden states' width, dtype and device.
        """
        if self._reduce is None:
            assert self._shared is not None
            agree = self._shared.agrees_with(self.compute_logits, like_ND)
            self._reduce = self._shared.reduce_rows if agree else reduce_rows
        return self._reduce is not reduce_rows

    def _layout(self, asked: Mapping[str, Any]) -> RowLayout:
        spec = TargetSpec(**{name: _tuple(asked[name]) for name in SPEC_FIELDS}) if asked else _PROFILE
        if spec.top_k > self._vocab_size:
            spec = replace(spec, top_k=self._vocab_size)
        width = self._hidden_size if "hidden" in spec.kinds else 0
        return RowLayout(spec, self._vocab_size, asked.get("gather_width", 0), width)


def _take(cache: list[torch.Tensor]) -> torch.Tensor:
    packed = torch.cat(cache) if cache else torch.empty((0, 0), dtype=torch.uint8)
    cache.clear()
    return packed


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _gather_ids(asked: Mapping[str, Any], start: int, stop: int) -> torch.Tensor | None:
    if "gather_ids" not in asked:
        return None
    ids_RG = np.frombuffer(asked["gather_ids"], dtype="<i4").reshape(-1, asked["gather_width"])
    first = asked["rows"][0]
    return torch.from_numpy(ids_RG[start - first : stop - first].astype(np.int64))
