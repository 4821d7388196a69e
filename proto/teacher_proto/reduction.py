"""Logits -> record, in torch: the one definition that every engine uses.

An engine hands over final hidden states and a function that makes logits of them; `reduce_rows` goes through them
in chunks on their own device and returns packed rows (`packed.py`), so that what leaves the engine is a single
tensor a sequence. The [rows, vocabulary] array of a chunk is all that ever exists of the logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_proto.packed import RowLayout
from teacher_proto.requests import HiddenDtype, TargetSpec
from teacher_proto.targets import id_dtype

if TYPE_CHECKING:
    import torch

# Rows through the head at a time: fewer waste the matrix product, more only cost memory (256 and 1024 rows were
# the best of 16 to 1024 on a CPU). The fp32 copies are made of still fewer, so that they stay in cache.
HEAD_ROWS = {"cpu": 256}
FLOAT_BYTES = {"cpu": 6 * 2**20}
HEAD_ROWS_ACCELERATOR = 1024
FLOAT_BYTES_ACCELERATOR = 256 * 2**20

NO_TOKEN = -1


@dataclass(frozen=True)
class Rows:
    """What the reduction needs beside the hidden states of N rows; tensors that no asked kind reads are None.

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


def sample_key(seed: int, tokens_T: np.ndarray) -> int:
    """The key of a sequence's draws, a signed 64-bit integer: the same for equal seed and tokens, wherever scored.

    The tokens are in it so that the noise of different sequences under one seed is independent.
    """
    state = hashlib.sha256(seed.to_bytes(8, "little") + np.ascontiguousarray(tokens_T, dtype="<i8").tobytes())
    return int.from_bytes(state.digest()[:8], "little", signed=True)


# --- on the device ---------------------------------------------------------------------------------------------


def reduce_rows(
    hidden_ND: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
    rows: Rows,
    layout: RowLayout,
) -> torch.Tensor | None:
    """Packed rows [N, row_bytes] uint8 of final hidden states [N, D], on their device.

    `compute_logits` makes [n, V] of [n, D], or None on a rank that takes part in the product and gets no result;
    then the answer is None as well. NaN in the logits is NaN in the record.
    """
    import torch

    device = hidden_ND.device
    head_rows = HEAD_ROWS.get(device.type, HEAD_ROWS_ACCELERATOR)
    packed_NB = torch.empty((len(hidden_ND), layout.row_bytes), dtype=torch.uint8, device=device)
    workspace: Workspace | None = None
    complete = True
    for start in range(0, len(hidden_ND), head_rows):
        stop = min(start + head_rows, len(hidden_ND))
        logits_nV = compute_logits(hidden_ND[start:stop])
        if logits_nV is None:
            complete = False
            continue
        workspace = workspace or Workspace(layout.vocab_size, device, len(hidden_ND))
        for a in range(start, stop, workspace.rows):
            b = min(a + workspace.rows, stop)
            columns = reduce_logits(logits_nV[a - start : b - start], rows.cut(a, b), layout.spec, workspace)
            if layout.spec.hidden_dtype is not None:
                columns |= pack_hidden(hidden_ND[a:b], layout.spec.hidden_dtype)
            _write(packed_NB[a:b], columns, layout)
    return packed_NB if complete else None


class Workspace:
    """Two fp32 arrays [rows, V] that every chunk is worked in: fresh ones would cost more than the arithmetic.

    V is rounded up to whole blocks for `top_k`; what is beyond the vocabulary is -inf.
    """

    def __init__(self, vocab_size: int, device: torch.device, most_rows: int):
        import torch

        self.block = 32 if vocab_size <= 65_536 else 64
        width = -(-vocab_size // self.block) * self.block
        budget = FLOAT_BYTES.get(device.type, FLOAT_BYTES_ACCELERATOR)
        self.rows = max(1, min(most_rows, budget // (4 * width)))
        self.vocab_size = vocab_size
        self.logits = torch.empty((self.rows, width), device=device)
        self.logprobs = torch.empty((self.rows, width), device=device)


def reduce_logits(logits_NV: torch.Tensor, rows: Rows, spec: TargetSpec, workspace: Workspace) -> dict[str, Any]:
    """The columns of N rows, N at most `workspace.rows`, by tensor name; ids int64, fp16 and fp32 as on the wire.

    With z the logits: lse = logsumexp(z); logprob = z - lse; log_z(T) = lse(z / T) - lse(z) / T, computed as
    logsumexp((z - lse) / T), which is the same and loses fewer digits.
    """
    import torch

    n = len(logits_NV)
    z_NW, logprob_NW = workspace.logits[:n], workspace.logprobs[:n]
    z_NW[:, : workspace.vocab_size].copy_(logits_NV)
    z_NW[:, workspace.vocab_size :] = -torch.inf
    values_NK, ids_NK = top_k(z_NW, max(spec.top_k, 1), workspace)
    # log_softmax and one subtraction at the largest logit: a fused pass, half the time of logsumexp on a CPU.
    best_N1 = ids_NK[:, :1]
    torch.log_softmax(z_NW, dim=-1, out=logprob_NW)
    lse_N = (values_NK[:, :1] - logprob_NW.gather(1, best_N1))[:, 0]
    columns: dict[str, Any] = {"lse": lse_N}
    if spec.top_k:
        columns |= {"ids": ids_NK, "logprobs": _half(values_NK - lse_N[:, None])}
    if rows.next_ids_N is not None:
        next_N1 = rows.next_ids_N[:, None]
        logprob_N = logprob_NW.gather(1, next_N1.clamp(min=0))[:, 0]
        columns["next_logprob"] = logprob_N.masked_fill(next_N1[:, 0] == NO_TOKEN, torch.nan)
    if rows.gather_ids_NG is not None:
        columns["gather_logprobs"] = _half(logprob_NW.gather(1, rows.gather_ids_NG))
    if spec.num_samples:
        columns["sampled_ids"] = draw(logprob_NW[:, : workspace.vocab_size], rows, spec)
    # The logits are not needed any more: their array takes the scaled logprobs.
    columns["log_z"] = _log_z(logprob_NW, best_N1, spec.temperatures, z_NW)
    return columns


def top_k(z_NW: torch.Tensor, k: int, workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, largest first, with their ids.

    They lie in the k blocks with the largest maxima, so only those are searched: 1.7 to 2.7 times as fast as a search
    of the whole row, with equal values.
    """
    width, block = z_NW.shape[1], workspace.block
    if k * 4 > width // block:
        values_NK, ids_NK = z_NW[:, : workspace.vocab_size].topk(k)
        return values_NK, ids_NK
    blocks_Nnb = z_NW.view(len(z_NW), width // block, block)
    chosen_NK = blocks_Nnb.amax(dim=-1).topk(k, sorted=False).indices
    candidates_NC = blocks_Nnb.gather(1, chosen_NK[:, :, None].expand(-1, -1, block)).flatten(1)
    values_NK, at_NK = candidates_NC.topk(k)
    ids_NK = chosen_NK.gather(1, at_NK // block) * block + at_NK % block
    return values_NK, ids_NK.clamp(max=workspace.vocab_size - 1)


def _log_z(
    logprob_NW: torch.Tensor, best_N1: torch.Tensor, temperatures: tuple[float, ...], scratch_NW: torch.Tensor
) -> torch.Tensor:
    import torch

    log_z_NT = logprob_NW.new_zeros((len(logprob_NW), len(temperatures)))
    for i, temperature in enumerate(temperatures):
        if temperature == 1.0:
            log_z_NT[:, i] = logprob_NW.gather(1, best_N1)[:, 0] * 0 + 0  # 0, or NaN where the row is
            continue
        torch.mul(logprob_NW, 1.0 / temperature, out=scratch_NW)
        best_N = scratch_NW.gather(1, best_N1)[:, 0]
        torch.log_softmax(scratch_NW, dim=-1, out=scratch_NW)
        log_z_NT[:, i] = best_N - scratch_NW.gather(1, best_N1)[:, 0]
    return log_z_NT


def _half(logprobs: torch.Tensor) -> torch.Tensor:
    """fp16 of logprobs, held between its smallest number and 0; NaN stays NaN."""
    import torch

    return logprobs.clamp(min=torch.finfo(torch.float16).min, max=0.0).half()


def draw(logprob_NV: torch.Tensor, rows: Rows, spec: TargetSpec) -> torch.Tensor:
    """`num_samples` ids a row, with replacement, by probability at `sample_temperature`; ascending within a row.

    Inverse transform of noise that is a function of (sample key, position, draw) alone, so a row's draws are the same
    however it was batched.
    """
    import torch

    assert rows.sample_keys_N is not None and rows.positions_N is not None
    distance_NV = logprob_NV - logprob_NV.amax(dim=-1, keepdim=True)
    cumulative_NV = (distance_NV * (1.0 / spec.sample_temperature)).exp().cumsum(dim=-1, dtype=torch.float64)
    uniform_NM = uniform_noise(rows.sample_keys_N, rows.positions_N, spec.num_samples)
    ids_NM = torch.searchsorted(cumulative_NV, uniform_NM * cumulative_NV[:, -1:], right=True)
    return ids_NM.clamp(max=logprob_NV.shape[1] - 1).sort(dim=-1).values


def uniform_noise(keys_N: torch.Tensor, positions_N: torch.Tensor, count: int) -> torch.Tensor:
    """[N, count] float64 in [0, 1): splitmix64 of key, position and number, the same on every device."""
    import torch

    number_M = torch.arange(1, count + 1, device=keys_N.device, dtype=torch.int64)
    state_N = _splitmix(keys_N + positions_N * -7046029254386353131)
    bits_NM = _splitmix(state_N[:, None] + number_M * -7046029254386353131)
    return _shift_right(bits_NM, 11).to(torch.float64) * 2.0**-53


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    # Steele, Lea and Flood (2014), finaliser of SplittableRandom; int64 wraps as uint64 does.
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def pack_hidden(hidden_ND: torch.Tensor, dtype: HiddenDtype) -> dict[str, Any]:
    """Hidden states as they travel: fp16 (held within its range), bf16, or int8 with scale = max|h| / 127 a row."""
    import torch

    if dtype == "float16":
        limits = torch.finfo(torch.float16)
        return {"hidden": hidden_ND.float().clamp(limits.min, limits.max).half()}
    if dtype == "bfloat16":
        return {"hidden": hidden_ND.bfloat16()}
    wide_ND = hidden_ND.float()
    scale_N = wide_ND.abs().amax(dim=-1) / 127
    steps_ND = (wide_ND / scale_N.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return {"hidden": steps_ND.clamp(-127, 127).to(torch.int8), "hidden_scale": scale_N}


def _write(packed_NB: torch.Tensor, columns: dict[str, Any], layout: RowLayout) -> None:
    """Put columns into their bytes of the rows."""
    import torch

    fields: dict[str, tuple[Any, ...]] = dict(layout.dtype.fields or {})
    for name, (field, offset, *_) in fields.items():
        if field.itemsize == 0:
            continue
        column = columns[name].contiguous()
        if name in ("ids", "sampled_ids"):
            width = 2 if id_dtype(layout.vocab_size) == "<u2" else 3
            bytes_NM4 = column.to(torch.int32).view(torch.uint8).reshape(*column.shape, 4)
            column = bytes_NM4[..., :width].contiguous()
        as_bytes = column.reshape(len(column), -1).view(torch.uint8)
        packed_NB[:, offset : offset + field.itemsize] = as_bytes
