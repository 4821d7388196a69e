"""What runs inside vLLM: any causal language model with a token-wise pooler that makes target records.

vLLM imports this in its engine processes, named by `VllmEngine` through vLLM's option `model_class_overrides`:
attribute `MODULE.CLASS` of this module is vLLM's class CLASS of MODULE, adapted. Nothing else imports it.

An exception in a pooler ends the engine, so requests are checked before they come here and nothing is refused here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.v1.pool.metadata import PoolingMetadata

from teacher_proto.packed import RowLayout
from teacher_proto.reduction import NO_TOKEN, Rows, reduce_rows
from teacher_proto.requests import TargetSpec

TASK = "token_classify"
# vLLM measures its memory with a run of requests that ask nothing: they are taken to ask for the most.
_PROFILE = TargetSpec(
    kinds=("top_k", "score", "sampled", "hidden"),
    top_k=256,
    temperatures=(2.0, 5.0),
    num_samples=64,
    hidden_dtype="float16",
)


def __getattr__(name: str) -> type:
    module, _, class_name = name.rpartition(".")
    if not module:
        raise AttributeError(name)
    return _adapt(getattr(importlib.import_module(module), class_name))


def _adapt(base: type) -> type:
    """`base` with `pooler`, under its own name, so that whatever vLLM keys by names still finds it."""

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)  # type: ignore[misc]
        model = vllm_config.model_config
        self.pooler = TargetsPooler(self.compute_logits, model.get_vocab_size(), model.get_hidden_size())

    body = {"is_pooling_model": True, "default_tok_pooling_type": "ALL", "__init__": __init__, "__module__": __name__}
    return type(base.__name__, (base,), body)


@dataclass(frozen=True)
class _Slice:
    """The wanted positions [start, stop) of one request that this step computed."""

    request: int
    start: int
    stop: int
    hidden_ND: torch.Tensor
    tokens_T: torch.Tensor
    asked: Mapping[str, Any]


class TargetsPooler(Pooler):
    """Packed rows of each request's wanted positions, gathered over the steps of a chunked prefill.

    `PoolingParams.extra_kwargs` is what `ask` made.
    """

    def __init__(
        self, compute_logits: Callable[[torch.Tensor], torch.Tensor | None], vocab_size: int, hidden_size: int
    ):
        super().__init__()
        self._compute_logits = compute_logits
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
        groups: dict[RowLayout, list[_Slice]] = {}
        each = zip(hidden_states.split(counts), counts, ends, pooling_metadata.get_prompt_token_ids_cpu(), strict=True)
        for i, (hidden_ND, count, end, tokens_T) in enumerate(each):
            if end == count:
                caches[i].clear()  # from the beginning, perhaps once more after a preemption
            asked = pooling_metadata.pooling_params[i].extra_kwargs or {}
            first, last = asked.get("rows", (0, len(tokens_T)))
            start, stop = max(first, end - count), min(last, end)
            if start < stop:
                wanted_ND = hidden_ND[start - (end - count) : stop - (end - count)]
                group = groups.setdefault(self._layout(asked), [])
                group.append(_Slice(i, start, stop, wanted_ND, tokens_T, asked))
        for layout, slices in groups.items():
            self._reduce(layout, slices, caches)
        return [self._take(cache) if done else None
                for cache, done in zip(caches, cursor.get_finished_mask(), strict=True)]  # fmt: skip

    def _layout(self, asked: Mapping[str, Any]) -> RowLayout:
        spec = TargetSpec(**{name: _tuple(asked[name]) for name in _SPEC_FIELDS}) if asked else _PROFILE
        if spec.top_k > self._vocab_size:
            spec = TargetSpec(**{**spec.__dict__, "top_k": self._vocab_size})
        width = self._hidden_size if "hidden" in spec.kinds else 0
        return RowLayout(spec, self._vocab_size, asked.get("gather_width", 0), width)

    def _reduce(self, layout: RowLayout, slices: list[_Slice], caches: list[list[torch.Tensor]]) -> None:
        parts = [s.hidden_ND for s in slices]
        hidden_ND = parts[0] if len(parts) == 1 else torch.cat(parts)
        rows = _rows(layout.spec, slices, hidden_ND.device)
        packed_NB = reduce_rows(hidden_ND, self._compute_logits, rows, layout)
        if packed_NB is None:
            return  # a rank that only helps with the product
        for s, part in zip(slices, packed_NB.split([s.stop - s.start for s in slices]), strict=True):
            caches[s.request].append(part)

    @staticmethod
    def _take(cache: list[torch.Tensor]) -> torch.Tensor:
        packed = torch.cat(cache) if cache else torch.empty((0, 0), dtype=torch.uint8)
        cache.clear()
        return packed


# --- how a request crosses from the service to the pooler --------------------------------------------------------

_SPEC_FIELDS = tuple(TargetSpec.__dataclass_fields__)


def ask(
    spec: TargetSpec, rows: tuple[int, int], gather_ids_RG: np.ndarray | None = None, sample_key: int = 0
) -> dict[str, Any]:
    """`extra_kwargs` of a request: plain values and bytes, which vLLM's own messages carry."""
    asked: dict[str, Any] = {name: getattr(spec, name) for name in _SPEC_FIELDS}
    asked |= {"rows": rows, "sample_key": sample_key}
    if gather_ids_RG is not None and "gather" in spec.kinds:
        asked |= {"gather_width": gather_ids_RG.shape[1], "gather_ids": gather_ids_RG.astype("<i4").tobytes()}
    return asked


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _rows(spec: TargetSpec, slices: list[_Slice], device: torch.device) -> Rows:
    """What the reduction needs beside hidden states, of all slices in a row."""

    def on_device(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(device, non_blocking=True)

    kinds = set(spec.kinds)
    next_ids = on_device([_next_ids(s) for s in slices]) if kinds & {"top_k", "score"} else None
    gather_ids = on_device([_gather_ids(s) for s in slices]) if "gather" in kinds else None
    if "sampled" not in kinds:
        return Rows(next_ids, gather_ids)
    keys = on_device([torch.full((s.stop - s.start,), s.asked.get("sample_key", 0)) for s in slices])
    positions = on_device([torch.arange(s.start, s.stop) for s in slices])
    return Rows(next_ids, gather_ids, keys, positions)


def _next_ids(s: _Slice) -> torch.Tensor:
    next_N = s.tokens_T[s.start + 1 : s.stop + 1].to(torch.int64)
    if len(next_N) < s.stop - s.start:
        next_N = torch.cat([next_N, torch.tensor([NO_TOKEN])])
    return next_N


def _gather_ids(s: _Slice) -> torch.Tensor:
    ids_RG = np.frombuffer(s.asked["gather_ids"], dtype="<i4").reshape(-1, s.asked["gather_width"])
    first = s.asked["rows"][0]
    return torch.from_numpy(ids_RG[s.start - first : s.stop - first].astype(np.int64))
