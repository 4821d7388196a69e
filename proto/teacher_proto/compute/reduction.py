"""The reduction of logits to records, in torch. Every engine uses it.

An engine passes final hidden states and a function that computes logits from them; `reduce_rows` goes through them in
chunks on their device and returns packed rows (`packed.py`), so that only a single tensor per sequence leaves the
engine. Of the logits, only the [rows, vocabulary] array of one chunk exists at a time.

A chunk is reduced by the passes in torch below, on any device, or, if `hardware.runs_triton`, by the kernels of
`reduction_triton.py`, which read it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teacher_proto import hardware
from teacher_proto.compute.sampling import draw
from teacher_proto.compute.top_k import BLOCK, top_k
from teacher_proto.requests import HiddenDtype, TargetSpec
from teacher_proto.targets import id_dtype
from teacher_proto.wire.packed import RowLayout

if TYPE_CHECKING:
    import torch

# Rows through the head at a time: fewer make the matrix product inefficient, more only cost memory (256 and 1024 rows
# were the best of 16 to 1024 on a CPU). fp32 copies are made of fewer rows still, so that they stay in cache.
HEAD_ROWS = {"cpu": 256}
FLOAT_BYTES = {"cpu": 6 * 2**20}
HEAD_ROWS_ACCELERATOR = 1024
FLOAT_BYTES_ACCELERATOR = 256 * 2**20

NO_TOKEN = -1


@dataclass(frozen=True)
class Rows:
    """What the reduction needs besides the hidden states of N rows; tensors that no requested kind reads are None.

    next_ids [N] int64, NO_TOKEN on a sequence's last row; gather_ids [N, G] int64; sample_keys [N] int64 from
    `sample_key`; positions [N] int64 in the sequence.
    """

    next_ids_N: torch.Tensor | None = None
    gather_ids_NG: torch.Tensor | None = None
    sample_keys_N: torch.Tensor | None = None
    positions_N: torch.Tensor | None = None

    def cut(self, start: int, stop: int) -> Rows:
        parts = (self.next_ids_N, self.gather_ids_NG, self.sample_keys_N, self.positions_N)
        return Rows(*(None if part is None else part[start:stop] for part in parts))


def chunk_rows(device: torch.device) -> int:
    """Rows that go through the head at a time."""
    return HEAD_ROWS.get(device.type, HEAD_ROWS_ACCELERATOR)


# --- on the device ---------------------------------------------------------------------------------------------


def reduce_rows(
    hidden_ND: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
    rows: Rows,
    layout: RowLayout,
) -> torch.Tensor | None:
    """Packed rows [N, row_bytes] uint8 of final hidden states [N, D], on their device.

    `compute_logits` maps [n, D] to [n, V], or returns None on a rank that takes part in the product but gets no
    result; then None is returned here too. NaN in the logits becomes NaN in the record.
    """
    import torch

    device = hidden_ND.device
    head_rows = chunk_rows(device)
    packed_NB = torch.empty((len(hidden_ND), layout.row_bytes), dtype=torch.uint8, device=device)
    one_pass = hardware.runs_triton(device)
    workspace: Workspace | None = None
    complete = True
    for start in range(0, len(hidden_ND), head_rows):
        stop = min(start + head_rows, len(hidden_ND))
        logits_nV = compute_logits(hidden_ND[start:stop])
        if logits_nV is None:
            complete = False
            continue
        chunk = rows.cut(start, stop)
        if one_pass:
            columns = _reduce_in_one_pass(logits_nV, chunk, layout.spec)
        else:
            workspace = workspace or Workspace(layout.vocab_size, device, len(hidden_ND))
            columns = _reduce_in_passes(logits_nV, chunk, layout.spec, workspace)
        if chunk.next_ids_N is not None:
            columns["next_logprob"].masked_fill_(chunk.next_ids_N == NO_TOKEN, torch.nan)
        del logits_nV  # or they would stay in memory while the next chunk's are computed
        if layout.spec.hidden_dtype is not None:
            columns |= pack_hidden(hidden_ND[start:stop], layout.spec.hidden_dtype)
        _write(packed_NB[start:stop], columns, layout)
    return packed_NB if complete else None


class Workspace:
    """Two reusable fp32 arrays [rows, W] for a few rows of a chunk at a time: allocating new ones would cost more than
    the arithmetic. W is V rounded up to whole blocks of columns.
    """

    def __init__(self, vocab_size: int, device: torch.device, most_rows: int):
        import torch

        width = -(-vocab_size // BLOCK) * BLOCK
        budget = FLOAT_BYTES.get(device.type, FLOAT_BYTES_ACCELERATOR)
        self.rows = max(1, min(most_rows, budget // (4 * width)))
        self.vocab_size = vocab_size
        self.logits = torch.empty((self.rows, width), device=device)
        self.scratch = torch.empty((self.rows, width), device=device)


def _reduce_in_one_pass(logits_NV: torch.Tensor, rows: Rows, spec: TargetSpec) -> dict[str, Any]:
    """The result of `_reduce_in_passes` from the Triton kernels; only draws go through the logits again."""
    import torch

    from teacher_proto.compute.reduction_triton import reduce_in_one_pass

    found = reduce_in_one_pass(logits_NV, rows.next_ids_N, spec.temperatures, spec.top_k)
    columns = {
        "lse": found.lse_N, "log_z": found.log_z_NT, "next_logprob": found.next_logprob_N, "ids": found.ids_NK,
        "logprobs": found.logprobs_NK,
    }  # fmt: skip
    if rows.gather_ids_NG is not None:
        gathered_NG = logits_NV.gather(1, rows.gather_ids_NG).float()
        # (z - m) - log S(1) instead of z - lse: a large lse would lose the difference to fp32 rounding.
        columns["gather_logprobs"] = _half(gathered_NG - found.best_N[:, None] - found.log_sum_N[:, None])
    if spec.num_samples:
        step = max(1, FLOAT_BYTES_ACCELERATOR // (4 * logits_NV.shape[1]))
        columns["sampled_ids"] = torch.cat([
            _draw(logits_NV[a : a + step].float().sub_(found.best_N[a : a + step, None]), rows.cut(a, a + step), spec)
            for a in range(0, len(logits_NV), step)
        ])  # fmt: skip
    return columns


def _reduce_in_passes(logits_NV: torch.Tensor, rows: Rows, spec: TargetSpec, workspace: Workspace) -> dict[str, Any]:
    """The columns of N rows by tensor name; ids int64, fp16 and fp32 as on the wire.

    With z the logits, m the largest and S(T) = sum exp((z - m) / T): lse = logsumexp(z) = m + log S(1);
    logprob = z - lse; log_z(T) = logsumexp(z / T) - lse / T = log S(T) - log S(1) / T.
    """
    import torch

    swept = [
        _sweep(logits_NV[a : a + workspace.rows], rows.cut(a, a + workspace.rows), spec, workspace)
        for a in range(0, len(logits_NV), workspace.rows)
    ]
    columns = {name: torch.cat([part[name] for part in swept]) for name in swept[0]}
    maxima_Nb = columns.pop("maxima")
    if spec.top_k:
        values_NK, ids_NK = top_k(logits_NV, spec.top_k, maxima_Nb)
        columns |= {"ids": ids_NK, "logprobs": _half(values_NK - columns["lse"][:, None])}
    return columns


def _sweep(logits_NV: torch.Tensor, rows: Rows, spec: TargetSpec, workspace: Workspace) -> dict[str, torch.Tensor]:
    """The part that reads every logit of N <= `workspace.rows` rows; `maxima` [N, blocks] are for `top_k`."""
    vocab_size = workspace.vocab_size
    z_NW, scratch_NW = workspace.logits[: len(logits_NV)], workspace.scratch[: len(logits_NV)]
    z_NW[:, :vocab_size].copy_(logits_NV)
    # The padding of the last block adds exp(-inf) = 0 to every sum, and is never the largest.
    z_NW[:, vocab_size:] = -math.inf
    maxima_Nb = z_NW.view(len(z_NW), -1, BLOCK).amax(dim=-1)
    best_N1 = maxima_Nb.amax(dim=-1, keepdim=True)
    # z - m <= 0, so that no exp overflows, and the largest term of every sum is 1.
    distance_NW = z_NW.sub_(best_N1)
    # Everything that reads single distances comes first: `_log_sums` overwrites them.
    next_N1 = None if rows.next_ids_N is None else distance_NW.gather(1, rows.next_ids_N[:, None].clamp(min=0))
    gathered_NG = None if rows.gather_ids_NG is None else distance_NW.gather(1, rows.gather_ids_NG)
    drawn = {"sampled_ids": _draw(distance_NW[:, :vocab_size], rows, spec)} if spec.num_samples else {}
    log_sums = _log_sums(distance_NW, spec.temperatures, scratch_NW)
    log_sum_N1 = log_sums[1.0]
    columns = {"maxima": maxima_Nb, "lse": (best_N1 + log_sum_N1)[:, 0], **drawn}
    if next_N1 is not None:
        columns["next_logprob"] = (next_N1 - log_sum_N1)[:, 0]
    if gathered_NG is not None:
        columns["gather_logprobs"] = _half(gathered_NG - log_sum_N1)
    # log_z(T) = log S(T) - log S(1) / T: the largest logit cancels.
    columns["log_z"] = log_sum_N1.new_empty((len(log_sum_N1), len(spec.temperatures)))
    for i, temperature in enumerate(spec.temperatures):
        columns["log_z"][:, i] = (log_sums[temperature] - log_sum_N1 / temperature)[:, 0]
    return columns


def _log_sums(
    distance_NW: torch.Tensor, temperatures: tuple[float, ...], scratch_NW: torch.Tensor
) -> dict[float, torch.Tensor]:
    """log sum exp(distance / T), [N, 1], for each T and for 1. Overwrites both arrays.

    The terms at 1 are computed as the squares of those at 2, which is cheaper than another exp if 2 is requested too.
    It is done even if 2 is not, so that a sum never depends on which other temperatures were requested.
    """
    log_sums = {t: _log_sum(_terms(distance_NW, t, scratch_NW)) for t in temperatures if t not in (1.0, 2.0)}
    # In place, which touches less memory: the distances are no longer needed.
    terms_NW = _terms(distance_NW, 2.0, distance_NW)
    if 2.0 in temperatures:
        log_sums[2.0] = _log_sum(terms_NW)
    return log_sums | {1.0: _log_sum(terms_NW.square_())}


def _terms(distance_NW: torch.Tensor, temperature: float, out_NW: torch.Tensor) -> torch.Tensor:
    """exp(distance / T), written to `out`, by `exp2`, which costs a third of `exp` on a CPU."""
    import torch

    return torch.mul(distance_NW, math.log2(math.e) / temperature, out=out_NW).exp2_()


def _log_sum(terms_NW: torch.Tensor) -> torch.Tensor:
    return terms_NW.sum(dim=-1, keepdim=True).log()


def _half(logprobs: torch.Tensor) -> torch.Tensor:
    """Logprobs as fp16, clamped between its lowest finite number and 0; NaN stays NaN."""
    import torch

    return logprobs.clamp(min=torch.finfo(torch.float16).min, max=0.0).half()


def _draw(distance_NV: torch.Tensor, rows: Rows, spec: TargetSpec) -> torch.Tensor:
    assert rows.sample_keys_N is not None and rows.positions_N is not None
    return draw(distance_NV, rows.sample_keys_N, rows.positions_N, spec.num_samples, spec.sample_temperature)


def pack_hidden(hidden_ND: torch.Tensor, dtype: HiddenDtype) -> dict[str, Any]:
    """Hidden states in a wire dtype: fp16 (clamped to its range), bf16, or int8 with scale = max|h| / 127 per row."""
    import torch

    if dtype == "float16":
        limits = torch.finfo(torch.float16)
        return {"hidden": hidden_ND.float().clamp(limits.min, limits.max).half()}
    if dtype == "bfloat16":
        return {"hidden": hidden_ND.bfloat16()}
    wide_ND = hidden_ND.float()
    # The scale of a row of zeros is 0; it is divided by the smallest normal number instead.
    scale_N = wide_ND.abs().amax(dim=-1) / 127
    steps_ND = (wide_ND / scale_N.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return {"hidden": steps_ND.clamp(-127, 127).to(torch.int8), "hidden_scale": scale_N}


def _write(packed_NB: torch.Tensor, columns: dict[str, Any], layout: RowLayout) -> None:
    """Write columns to their bytes in the packed rows."""
    import torch

    fields: dict[str, tuple[Any, ...]] = dict(layout.dtype.fields or {})
    for name, (field, offset, *_) in fields.items():
        if field.itemsize == 0:
            continue
        column = columns[name].contiguous()
        if name in ("ids", "sampled_ids"):
            width = 2 if id_dtype(layout.vocab_size) == "<u2" else 3
            # Little-endian: the first two or three bytes of an int32 are the id.
            bytes_NM4 = column.to(torch.int32).view(torch.uint8).reshape(*column.shape, 4)
            column = bytes_NM4[..., :width].contiguous()
        as_bytes = column.reshape(len(column), -1).view(torch.uint8)
        packed_NB[:, offset : offset + field.itemsize] = as_bytes
