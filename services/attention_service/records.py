"""From what a layer attends with to the record of a response: states, relations or maps of one sequence.

Called by `model.py`; computes on the device. Relations and maps are computed a block of rows at a time, so that no
float32 [heads, T, T] is ever materialised.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from attention_service.tap import Attended
from teacher_proto.attention import AttentionQuery
from teacher_proto.attention_targets import PARTS, AttentionTargets
from teacher_proto.compute.relations import log_relation_rows, similarity_factor
from teacher_proto.errors import EngineError

# float32 numbers held at a time: 32 MiB for each of a few arrays.
BLOCK_ENTRIES = 2**23
_INT8_MAX = 127


def make_record(query: AttentionQuery, attended: Attended, place: int) -> AttentionTargets:
    """The record of the sequence at index `place` of the batch. EngineError for numbers that are not finite."""
    length = len(query.tokens_T)
    states = {
        part: getattr(attended, name)[place, :, :length]
        for part, name in zip(PARTS, ("query_BHTd", "key_BGTd", "value_BGTd"), strict=True)
    }
    rows_r = None if query.rows_r is None else query.rows_r.astype(np.int32)
    if query.spec.kind == "states":
        tensors = _states({part: x_HTd.transpose(0, 1) for part, x_HTd in states.items()}, query)
    elif query.spec.kind == "relations":
        tensors = {part: _relations(x_HTd.transpose(0, 1), query, part) for part, x_HTd in states.items()}
    else:
        tensors = {"maps": _maps(states["query"], states["key"], attended, place, query)}
    return AttentionTargets(query.spec.kind, query.spec.layer, rows_r, **tensors)


def _states(states: dict[str, Tensor], query: AttentionQuery) -> dict[str, np.ndarray]:
    """[T, H, d] of each part as fp16, or as int8 with one scale per position and head."""
    tensors: dict[str, np.ndarray] = {}
    for part, states_THd in states.items():
        if query.spec.dtype == "float16":
            tensors[part] = _finite(states_THd.to(torch.float16), part, query).cpu().numpy()
            continue
        wide_THd = _finite(states_THd.float(), part, query)
        scale_TH1 = wide_THd.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
        codes_THd = torch.where(scale_TH1 > 0, wide_THd / scale_TH1, 0).round().to(torch.int8)
        tensors |= {part: codes_THd.cpu().numpy(), f"{part}_scale": scale_TH1.cpu().numpy()}
    return tensors


def _relations(states_THd: Tensor, query: AttentionQuery, part: str) -> np.ndarray:
    """[R, r, T] fp16."""
    spec = query.spec
    assert spec.form is not None, "a request for relations has a form"
    # Rounded like served states, so that relations computed from states are the same.
    rounded_THd = _finite(states_THd.to(torch.float16), part, query)
    factor_RTd = similarity_factor(rounded_THd, form=spec.form, relation_heads=spec.relation_heads)
    form = spec.form
    return _by_rows(query, spec.relation_heads, len(query.tokens_T), factor_RTd.device,
                    lambda rows_r: log_relation_rows(factor_RTd, rows_r, form).exp())  # fmt: skip


def _maps(query_HTd: Tensor, key_GTd: Tensor, attended: Attended, place: int, query: AttentionQuery) -> np.ndarray:
    """[H, r, T or b] fp16: the softmax that the layer itself computes."""
    length, block_size = len(query.tokens_T), query.spec.block_size
    query_HTd, key_HTd = query_HTd.float(), key_GTd.float()
    key_HTd = key_HTd.repeat_interleave(len(query_HTd) // len(key_HTd), dim=0)
    _finite(query_HTd, "query", query), _finite(key_HTd, "key", query)
    columns_T = torch.arange(length, device=query_HTd.device)

    def of(rows_r: Tensor) -> Tensor:
        logits_HrT = query_HTd[:, rows_r] @ key_HTd.transpose(1, 2) * attended.scaling
        if attended.soft_cap is not None:
            logits_HrT = attended.soft_cap * torch.tanh(logits_HrT / attended.soft_cap)
        seen_rT = columns_T <= rows_r[:, None]
        if attended.mask is not None:
            # The first axis of a mask has size 1 if the mask is the same for the whole batch.
            mask_TT = attended.mask[place % len(attended.mask), 0]
            row_rT = mask_TT[rows_r, :length]
            seen_rT &= row_rT if row_rT.dtype == torch.bool else row_rT >= 0
        maps_HrT = logits_HrT.masked_fill(~seen_rT, -math.inf).softmax(dim=-1)
        return maps_HrT if block_size is None else _within_blocks(maps_HrT, rows_r, min(length, block_size), block_size)

    return _by_rows(query, len(query_HTd), min(length, block_size or length), query_HTd.device, of, of_whole=length)


def _within_blocks(maps_HrT: Tensor, rows_r: Tensor, width: int, block_size: int) -> Tensor:
    """[H, r, width]: for each row the columns of its own block; those beyond the end are 0."""
    length = maps_HrT.shape[-1]
    columns_rb = (rows_r // block_size * block_size)[:, None] + torch.arange(width, device=rows_r.device)
    inside_rb = columns_rb < length
    columns_Hrb = columns_rb.clamp(max=length - 1).expand(len(maps_HrT), -1, -1)
    return maps_HrT.gather(-1, columns_Hrb) * inside_rb


def _by_rows(
    query: AttentionQuery, heads: int, width: int, device: torch.device, of: Callable[[Tensor], Tensor],
    of_whole: int | None = None,
) -> np.ndarray:  # fmt: skip
    """[heads, r, width] fp16 of the query's rows, from `of` for a block of them at a time. `of_whole` is the width that
    `of` computes, if not `width`."""
    rows_r = np.arange(len(query.tokens_T)) if query.rows_r is None else query.rows_r
    table = np.empty((heads, len(rows_r), width), dtype=np.float16)
    step = max(1, BLOCK_ENTRIES // (heads * (of_whole or width)))
    for start in range(0, len(rows_r), step):
        block_r = torch.tensor(rows_r[start : start + step], device=device)
        table[:, start : start + step] = of(block_r).to(torch.float16).cpu().numpy()
    return table


def _finite(states: Tensor, part: str, query: AttentionQuery) -> Tensor:
    if not torch.isfinite(states).all():
        fits = states.dtype != torch.float16
        what = (
            "is not finite: its weights overflow"
            if fits
            else "does not fit float16: request states with dtype int8, unless its weights overflow"
        )
        raise EngineError(
            f"the teacher's {part} of layer {query.spec.layer} {what} on this sequence",
            field=part, retryable=False,
        )  # fmt: skip
    return states
