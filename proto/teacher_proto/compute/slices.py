"""Reduces the requested rows of several sequences, an engine's batch, together.

Used by `hf_model` and, inside vLLM, by `vllm_adapter`. torch is imported on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teacher_proto.compute.reduction import NO_TOKEN, Rows, reduce_rows
from teacher_proto.requests import TargetSpec
from teacher_proto.wire.packed import RowLayout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Slice:
    """Positions [start, stop) of one sequence: their hidden states [N, D] and what else their targets depend on.

    tokens [T] is the whole sequence, on the CPU; gather_ids [N, G] int64 belongs to kind `gather`.
    """

    start: int
    stop: int
    hidden_ND: torch.Tensor
    tokens_T: torch.Tensor
    gather_ids_NG: torch.Tensor | None = None
    sample_key: int = 0


def reduce_slices(
    slices: Sequence[Slice],
    compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
    layout: RowLayout,
    reduce: Callable[..., torch.Tensor | None] = reduce_rows,
) -> list[torch.Tensor] | None:
    """Packed rows of each slice; all have the same layout. None if `reduce`, which has the interface of `reduce_rows`,
    returns None."""
    import torch

    hidden_ND = slices[0].hidden_ND if len(slices) == 1 else torch.cat([s.hidden_ND for s in slices])
    packed_NB = reduce(hidden_ND, compute_logits, _rows(layout.spec, slices, hidden_ND.device), layout)
    return None if packed_NB is None else list(packed_NB.split([s.stop - s.start for s in slices]))


def _rows(spec: TargetSpec, slices: Sequence[Slice], device: torch.device) -> Rows:
    import torch

    def on_device(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(device, non_blocking=True)

    kinds = set(spec.kinds)
    next_ids = gather_ids = keys = positions = None
    if kinds & {"top_k", "score"}:
        next_ids = on_device([_next_ids(s) for s in slices])
    if "gather" in kinds:
        gather_ids = on_device([s.gather_ids_NG for s in slices if s.gather_ids_NG is not None])
    if "sampled" in kinds:
        keys = on_device([torch.full((s.stop - s.start,), s.sample_key) for s in slices])
        positions = on_device([torch.arange(s.start, s.stop) for s in slices])
    return Rows(next_ids, gather_ids, keys, positions)


def _next_ids(s: Slice) -> torch.Tensor:
    import torch

    next_N = s.tokens_T[s.start + 1 : s.stop + 1].to(torch.int64)
    if len(next_N) == s.stop - s.start:
        return next_N
    return torch.cat([next_N, torch.tensor([NO_TOKEN])])
