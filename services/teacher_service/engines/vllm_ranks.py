"""Tensor parallelism: the ranks of a head share its rows, whereas vLLM has each of them gather and reduce all logits.

Used by `vllm_adapter.py` on every rank. Each rank holds some columns of the head. It multiplies all rows by them, then
an all-to-all swaps columns for rows, and each rank reduces its own rows with all of their logits. So a logit is sent
once, where an all-gather sends it to every rank, and reduced once. The packed rows, some hundred bytes each, go to the
first rank, which returns them to vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from teacher_proto.compute.reduction import Rows, chunk_rows, reduce_rows
from teacher_proto.wire.packed import RowLayout

_PROBE_ROWS = 3  # per rank
_TOLERANCE = 1e-2  # relative to the largest logit; in the head's dtype, another order of sums differs as much


class SharedHead:
    """The head of a model on the ranks of `group`. `multiply` computes this rank's columns [n, C] of the logits, soft
    cap and scale included, from hidden states [n, D]; columns beyond the vocabulary, on the last ranks, are padding.
    """

    def __init__(self, multiply: Callable[[torch.Tensor], torch.Tensor], vocab_size: int, group: dist.ProcessGroup):
        self._multiply = multiply
        self._vocab_size = vocab_size
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def reduce_rows(
        self, hidden_ND: torch.Tensor, compute_logits: Any, rows: Rows, layout: RowLayout
    ) -> torch.Tensor | None:
        """Like `reduction.reduce_rows` on the first rank; None on the others. All are called with the same inputs."""
        packed_NB = torch.zeros((len(hidden_ND), layout.row_bytes), dtype=torch.uint8, device=hidden_ND.device)
        step = chunk_rows(hidden_ND.device) * self._size
        for start in range(0, len(hidden_ND), step):
            chunk_nD = hidden_ND[start : start + step]
            logits_mV = self.logits(chunk_nD)
            a, b = (start + place for place in self._own(len(chunk_nD)))
            if a < b:
                own = reduce_rows(hidden_ND[a:b], lambda _, made=logits_mV: made, rows.cut(a, b), layout)  # type: ignore[misc]
                assert own is not None
                packed_NB[a:b] = own
            del logits_mV
        # Each row is zero on all ranks but one, so their sum is the result.
        dist.reduce(packed_NB, dst=dist.get_global_rank(self._group, 0), group=self._group)
        return packed_NB if self._rank == 0 else None

    def logits(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        """Logits [m, V] of this rank's m of the n rows."""
        share = -(-len(hidden_nD) // self._size)
        filled_nD = torch.nn.functional.pad(hidden_nD, (0, 0, 0, share * self._size - len(hidden_nD)))
        sent_nC = self._multiply(filled_nD).contiguous()
        received_nC = torch.empty_like(sent_nC)
        dist.all_to_all_single(received_nC, sent_nC, group=self._group)
        # Rank r has sent its columns of our rows.
        logits_mV = received_nC.view(self._size, share, -1).transpose(0, 1).flatten(1)[:, : self._vocab_size]
        a, b = self._own(len(hidden_nD))
        return logits_mV[: b - a]

    def agrees_with(self, compute_logits: Callable[[torch.Tensor], torch.Tensor | None], like_ND: torch.Tensor) -> bool:
        """Whether the ranks together compute the same logits as the model, which may do more than it seems to. Tested
        on random hidden states; the result is the same on all ranks."""
        n = _PROBE_ROWS * self._size
        generator = torch.Generator().manual_seed(0)
        hidden_nD = torch.randn((n, like_ND.shape[1]), generator=generator).to(like_ND)
        theirs_nV = compute_logits(hidden_nD)
        if theirs_nV is None or theirs_nV.shape != (n, self._vocab_size):
            off = torch.inf
        else:
            a, b = self._own(n)
            theirs_mV = theirs_nV[a:b].float()
            off = float((self.logits(hidden_nD).float() - theirs_mV).abs().max() / theirs_mV.abs().max())
        worst = torch.tensor([off if off == off else torch.inf], device=like_ND.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._group)
        return bool(worst.item() <= _TOLERANCE)

    def _own(self, n: int) -> tuple[int, int]:
        """The range of the n rows that is this rank's."""
        share = -(-n // self._size)
        return min(self._rank * share, n), min((self._rank + 1) * share, n)


def shared_head(model: Any, vocab_size: int) -> SharedHead | None:
    """The shared head of vLLM's model on this rank; None if there is one rank, or its head is unlike most models'."""
    from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

    if getattr(model, "logits_processor", None) is None and hasattr(model, "get_language_model"):
        model = model.get_language_model()  # a model with a vision tower
    processor, head = getattr(model, "logits_processor", None), getattr(model, "lm_head", None)
    if get_tensor_model_parallel_world_size() == 1 or processor is None or getattr(head, "tp_size", 1) == 1:
        return None
    return SharedHead(
        lambda hidden_nD: processor(head, hidden_nD, skip_gather=True), vocab_size, get_tp_group().device_group
    )
