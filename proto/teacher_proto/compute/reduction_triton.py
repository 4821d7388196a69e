"""Computes normalisers and top-K in one pass over the logits, in Triton. Used by `reduction` on CUDA devices.

`reduction` imports this if `hardware.runs_triton`; the kernels are in `reduction_kernels.py`. Tests compare them with
the passes in torch that `reduction` has for any device.

A row of V = 151,936 logits in fp32 is 608 kB, 1,024 rows are 622 MB, and an H100 reads that in 0.19 ms. The aim is to
read them once, and to compute for less time than the reading takes: at most 0.5 ms for everything.

* `stream` reads every logit once. A program is one warp with a segment of a row, in tiles of 1,024 logits that stay in
  registers, so that reductions need only shuffles within the warp and no barrier. It has 64 registers per thread: 32
  programs share a multiprocessor, and their loads of 4 kB each cover the memory latency several times over. For T = 1,
  2 and 5 a logit costs two exponentials (the terms at 1 are squares of those at 2) and some 16 instructions. That is
  0.09 ms of the special function units and 0.09 ms of issue slots, both in parallel with the reading. It writes the
  largest logit and the sums of each segment, and the largest of every 64 logits: a sixtieth of what was read.
* `combine`, one program per row, combines the results of the row's segments, and chooses the K blocks of 64 with the
  largest maxima: no logit of another block can be among the K largest, since each of these K has one that is as large.
* `pick` reads the chosen blocks again, 16 kB per row at K = 64, and keeps the K largest; `place` sorts them. A K-th
  largest is found bit by bit, by counting, without sorting: 32 steps over values in registers, some hundredths of a
  millisecond for 1,024 rows.

Among equal logits the lower id comes first. No result depends on what else is requested, or on the other rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from teacher_proto.compute.reduction_kernels import combine, pick, place, stream
from teacher_proto.compute.top_k import BLOCK

# Logits per step of `stream`, in blocks of BLOCK: 32 registers in each thread of a warp.
TILE_BLOCKS = 16
# Tiles per program of `stream`: enough programs that the last ones end together, few enough segments to combine.
SEGMENT_TILES = 8
SEGMENT = TILE_BLOCKS * BLOCK * SEGMENT_TILES
# The largest K for which `pick` searches in registers (64 in each of 256 threads); above it, torch sorts.
PICK_MOST = 256
# Elements of a row per warp in the kernels after `stream`, 32 registers in each thread, with up to _MOST_WARPS warps.
_WARP_ELEMENTS = 1024
_MOST_WARPS = 8
# Elements for which these kernels compute output slots at a time.
PIECE = 1024
# Fused multiply-add, set explicitly since Triton's default changes.
_FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class ReducedRows:
    """The results of one pass over N rows; fp32, ids int32.

    With m the largest logit and S(T) = sum exp((z - m) / T): `best` [N] is m, `log_sum` [N] log S(1), `lse` [N] their
    sum, `log_z` [N, T] log S(T) - log S(1) / T, `next_logprob` [N] z - m - log S(1) of the next id. `ids` [N, K]
    and `logprobs` [N, K], fp16, are the K largest, largest first. None if not requested.
    """

    best_N: torch.Tensor
    log_sum_N: torch.Tensor
    lse_N: torch.Tensor
    log_z_NT: torch.Tensor
    next_logprob_N: torch.Tensor | None
    ids_NK: torch.Tensor | None
    logprobs_NK: torch.Tensor | None


def reduce_in_one_pass(
    logits_NV: torch.Tensor, next_ids_N: torch.Tensor | None, temperatures: tuple[float, ...], k: int
) -> ReducedRows:
    """The results for N rows of logits in any float dtype, with any row stride; k = 0 requests no top-K.

    A negative id in `next_ids` is read as 0.
    """
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    n, vocab_size = logits_NV.shape
    device = logits_NV.device
    lanes = _lanes(temperatures, device)
    segments, blocks = triton.cdiv(vocab_size, SEGMENT), triton.cdiv(vocab_size, BLOCK)
    width = len(lanes.coefficients)
    best_NS = torch.empty((n, segments), device=device)
    sums_NSL = torch.empty((n, segments, width), device=device)
    maxima_Nb = torch.empty((n, blocks if k else 0), device=device)
    best_N, log_sum_N, lse_N, next_logprob_N = torch.empty((4, n), device=device)
    log_z_NT = torch.empty((n, len(temperatures)), device=device)
    chosen_NC = torch.empty((n, min(k, blocks)), dtype=torch.int32, device=device)
    # Kernels are launched on the current device, which need not be that of the logits. Does nothing for a CPU tensor.
    with torch.cuda.device_of(logits_NV):
        stream[(segments, n)](
            logits_NV, logits_NV.stride(0), vocab_size, lanes.coefficients, best_NS, sums_NSL, maxima_Nb,
            segments, blocks, LANES=lanes.used, WIDTH=width, TILES=SEGMENT_TILES, ROWS=TILE_BLOCKS,
            COLUMNS=BLOCK, MAXIMA=k > 0, num_warps=1, **_FUSED,
        )  # fmt: skip
        blocks_up = triton.next_power_of_2(blocks) if k else 1
        combine[(n,)](
            logits_NV, logits_NV.stride(0), log_z_NT if next_ids_N is None else next_ids_N, best_NS, sums_NSL,
            maxima_Nb, lanes.coefficients, lanes.temperatures, lanes.places, best_N, log_sum_N, lse_N, next_logprob_N,
            log_z_NT, chosen_NC, segments, blocks, len(temperatures), chosen_NC.shape[1],
            SEGMENTS_UP=triton.next_power_of_2(segments), WIDTH=width, BLOCKS_UP=blocks_up, PIECE=min(blocks_up, PIECE),
            NEXT=next_ids_N is not None, CHOOSE=k > 0, num_warps=warps_for(blocks_up), **_FUSED,
        )  # fmt: skip
        ids_NK, logprobs_NK = _largest(logits_NV, chosen_NC, best_N, log_sum_N, k) if k else (None, None)
    return ReducedRows(
        best_N, log_sum_N, lse_N, log_z_NT, None if next_ids_N is None else next_logprob_N, ids_NK, logprobs_NK
    )


def _largest(
    logits_NV: torch.Tensor, chosen_NC: torch.Tensor, best_N: torch.Tensor, log_sum_N: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logprobs of the k largest logits in the chosen blocks."""
    (n, vocab_size), count = logits_NV.shape, chosen_NC.shape[1]
    values_NK = torch.empty((n, k), device=logits_NV.device)
    ids_NK = torch.empty((n, k), dtype=torch.int32, device=logits_NV.device)
    logprobs_NK = torch.empty((n, k), dtype=torch.float16, device=logits_NV.device)
    if k > PICK_MOST:
        return _sorted(logits_NV, chosen_NC, best_N, log_sum_N, k)
    candidates = triton.next_power_of_2(count) * BLOCK
    pick[(n,)](
        logits_NV, logits_NV.stride(0), vocab_size, chosen_NC, values_NK, ids_NK, count, k,
        COLUMNS=BLOCK, CANDIDATES=candidates, PIECE=min(candidates, PIECE), num_warps=warps_for(candidates), **_FUSED,
    )  # fmt: skip
    placed_NK = torch.empty_like(ids_NK)
    ranks = max(16, triton.next_power_of_2(k))
    place[(n,)](
        values_NK, ids_NK, best_N, log_sum_N, placed_NK, logprobs_NK, k, RANKS=ranks, STEP=16,
        num_warps=warps_for(ranks * 16), **_FUSED,
    )  # fmt: skip
    return placed_NK, logprobs_NK


def _sorted(
    logits_NV: torch.Tensor, chosen_NC: torch.Tensor, best_N: torch.Tensor, log_sum_N: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for any k, by a stable sort of the chosen blocks; 64 rows at a time, to limit memory."""
    vocab_size = logits_NV.shape[1]
    ids, logprobs = [], []
    in_block = torch.arange(BLOCK, device=logits_NV.device)
    parts = (x.split(64) for x in (logits_NV, chosen_NC, best_N[:, None], log_sum_N[:, None]))
    for logits, chosen, best, log_sum in zip(*parts, strict=True):
        columns_nC = (chosen[:, :, None].long() * BLOCK + in_block).flatten(1)
        values_nC = logits.gather(1, columns_nC.clamp(max=vocab_size - 1)).float()
        values_nC = values_nC.masked_fill(columns_nC >= vocab_size, -torch.inf)
        values_nC, order_nC = values_nC.sort(dim=1, descending=True, stable=True)
        ids.append(columns_nC.gather(1, order_nC[:, :k]).int())
        smallest = torch.finfo(torch.float16).min
        logprobs.append((values_nC[:, :k] - best - log_sum).clamp(min=smallest, max=0.0).half())
    return torch.cat(ids), torch.cat(logprobs)


def warps_for(elements: int) -> int:
    """Warps for a program that holds this many elements, a power of two."""
    return min(_MOST_WARPS, max(1, triton.next_power_of_2(elements) // _WARP_ELEMENTS))


@dataclass(frozen=True)
class _Lanes:
    """The sums of a row, one lane per temperature: 1, 2, then the others requested. Padded to a power of two.

    `coefficients` [L] are log2(e) / T, `temperatures` [L] T, `places` [L] the column of `log_z` or -1.
    """

    used: int
    coefficients: torch.Tensor
    temperatures: torch.Tensor
    places: torch.Tensor


@lru_cache(maxsize=64)
def _lanes(temperatures: tuple[float, ...], device: torch.device) -> _Lanes:
    """Cached, since copying to the device for every chunk would synchronise with it."""
    lanes = [1.0, 2.0, *(t for t in temperatures if t not in (1.0, 2.0))]
    fill = triton.next_power_of_2(len(lanes)) - len(lanes)
    filled = lanes + [1.0] * fill
    places = [temperatures.index(t) if t in temperatures else -1 for t in lanes] + [-1] * fill
    return _Lanes(
        len(lanes),
        torch.tensor([math.log2(math.e) / t for t in filled], device=device),
        torch.tensor(filled, device=device),
        torch.tensor(places, dtype=torch.int32, device=device),
    )
