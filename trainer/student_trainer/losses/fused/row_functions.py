"""Triton functions of one row that the kernels share: raw products to logits, normalisers, a support's part in these.
Called by `normalise`, `compare` and `gradient`, which have one program per row.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl

# The values of `passes.HOLE` and `supports.LOG_FLOOR`; a test compares them.
HOLE = tl.constexpr(-1e20)
LOG_FLOOR = tl.constexpr(-87.0)
# Below every logit and every hole, yet finite: a running maximum starts here.
LOWEST = tl.constexpr(-1e30)
# Tables whose alignment, and counts whose value, differ between chunks: no kernel is specialised on them.
UNALIGNED = (
    "labels_ptr", "ids_ptr", "logprobs_ptr", "tails_ptr", "weights_ptr", "values_ptr", "rest_ptr", "row_ptr", "at_ptr",
    "at_label_ptr", "top_ptr", "lse_ptr", "totals_ptr", "ids0_ptr", "at0_ptr", "ids1_ptr", "at1_ptr", "ids2_ptr",
    "at2_ptr",
)  # fmt: skip
VARYING = ("rows", "K", "K0", "K1", "K2")


def kernel(function: Any) -> Any:
    """`triton.jit`, without specialising on the rows that a chunk has."""
    names = inspect.signature(function).parameters
    return triton.jit(
        do_not_specialize=[name for name in VARYING if name in names],
        do_not_specialize_on_alignment=[name for name in UNALIGNED if name in names],
    )(function)


@triton.jit
def to_logits(raw, columns, inside, bias_ptr, HEAD: tl.constexpr):
    """Products to logits, z = cap(scale * (product + bias)); a hole stays a hole. HEAD: (1 if there is a bias, scale,
    softcap or 0).
    """
    x = raw
    if HEAD[0] == 1:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    x *= HEAD[1]
    if HEAD[2] > 0.0:
        # tanh |y| = (1 - exp(-2 |y|)) / (1 + exp(-2 |y|)), whose exponential can't overflow; then the sign.
        e = tl.exp(-2.0 * tl.abs(x) / HEAD[2])
        tanh = (1.0 - e) / (1.0 + e)
        x = HEAD[2] * tl.where(x < 0.0, -tanh, tanh)
    # A cap would turn a hole into an ordinary logit. A tenth of HOLE, since the value may have been rounded.
    return tl.where(raw < 0.1 * HOLE, HOLE, x)


@triton.jit
def by_softmax(SOFTMAXES: tl.constexpr, FIELD: tl.constexpr, PAD: tl.constexpr, DTYPE: tl.constexpr):
    """One field of every softmax as a vector [PAD], filled up with 1."""
    index = tl.arange(0, PAD)
    # A tuple of constants can't be loaded like a tensor: each is put in its place.
    out = tl.full([PAD], 1.0, DTYPE)
    for s in tl.static_range(len(SOFTMAXES)):
        out = tl.where(index == s, SOFTMAXES[s][FIELD], out)
    return out


@triton.jit
def pick(table, index, s):
    """Row s of a table [S, K]."""
    return tl.sum(tl.where(index[:, None] == s, table, 0.0), 0)


@triton.jit
def pick_one(vector, index, s):
    """Entry s of a vector [S]. Triton can't index a tensor in registers, but it can sum one under a mask."""
    return tl.sum(tl.where(index == s, vector, 0.0), 0)


@triton.jit
def fold(x, largest, sums, inverse):
    """The largest logit so far and the sums [S, BLOCK] of exp((logit - largest) / T), with a block of logits added."""
    new = tl.maximum(largest, tl.max(x, 0))
    # Sums relative to the old maximum are rescaled to the new one, softmax by softmax. One maximum serves all
    # temperatures: the largest logit is the largest at each of them.
    sums = sums * tl.exp((largest - new) * inverse)[:, None] + tl.exp((x - new)[None, :] * inverse[:, None])
    return new, sums


@triton.jit
def normaliser(largest, sums, inverse):
    """lse(z / T) of each softmax [S], from the results of `fold`: max / T + log of the sum of exp((z - max) / T)."""
    return largest * inverse + tl.log(tl.sum(sums, 1))


@triton.jit
def add_block(
    z_row, bias_ptr, start, stop, inverse, largest, sums, top_id, HEAD: tl.constexpr, WANT_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(largest, sums, top_id) with the block of logits from `start` on added, up to `stop`."""
    columns = start + tl.arange(0, BLOCK)
    raw = tl.load(z_row + columns, mask=columns < stop, other=0.0)
    x = to_logits(raw, columns, columns < stop, bias_ptr, HEAD)
    # Columns past the end add exp(-inf) = 0.
    x = tl.where(columns < stop, x, float("-inf"))
    if WANT_TOP:
        block_top, block_id = tl.max(x, 0, return_indices=True)
        # Strictly larger: of equal logits the first one wins.
        top_id = tl.where(block_top > largest, start + block_id, top_id)
    largest, sums = fold(x, largest, sums, inverse)
    return largest, sums, top_id


@triton.jit
def sweep(
    z_row, bias_ptr, W, V, inverse, wide, HEAD: tl.constexpr, WANT_TOP: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(normalisers [S] of the row as it stands, largest logit, its id). Over all V ids if `wide`, else over W."""
    top_id = 0
    largest = tl.full([], LOWEST, DTYPE)
    # One sum per column of a block, not per row: the columns are added once, when the row is done.
    sums = tl.zeros([inverse.shape[0], BLOCK], DTYPE)
    for start in range(0, W, BLOCK):
        largest, sums, top_id = add_block(
            z_row, bias_ptr, start, W, inverse, largest, sums, top_id, HEAD, WANT_TOP, BLOCK
        )
    # The softmaxes over the W ids that student and teacher share are complete here.
    narrow = normaliser(largest, sums, inverse)
    for start in range(W, V, BLOCK):  # ids that only softmaxes over the whole vocabulary have
        largest, sums, top_id = add_block(
            z_row, bias_ptr, start, V, inverse, largest, sums, top_id, HEAD, WANT_TOP, BLOCK
        )
    return tl.where(wide > 0.0, normaliser(largest, sums, inverse), narrow), largest, top_id


@triton.jit
def sweep_without(
    z_row, ids, raw_K, live, bias_ptr, W, V, inverse, wide, HEAD: tl.constexpr, WANT_TOP: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`sweep` of the row without the products `raw_K` at `ids`, which are put back afterwards: 1 - sum over K of q
    would lose the digits of a small tail, so the tail is summed on its own.
    """
    # Every thread has finished reading before any writes, and all have written before any reads again.
    tl.debug_barrier()
    tl.store(z_row + ids, HOLE, mask=live)
    tl.debug_barrier()
    rest, largest, top_id = sweep(z_row, bias_ptr, W, V, inverse, wide, HEAD, WANT_TOP, BLOCK, DTYPE)
    tl.debug_barrier()
    tl.store(z_row + ids, raw_K, mask=live)
    return rest, largest, top_id


@triton.jit
def most_likely(x_K, ids, live, largest, top_id, V):
    """The id of the row's largest logit: the sweep's, or one of the ids that were taken out for it."""
    at_top = tl.max(tl.where(live, x_K, LOWEST), 0)
    # Of equal logits, the lowest id.
    at_id = tl.min(tl.where(live & (x_K == at_top), ids, V), 0)
    wins = (at_top > largest) | ((at_top == largest) & (at_id < top_id))
    return tl.where(wins, at_id, top_id).to(tl.int64)


@triton.jit
def with_ids(lse, scaled, which):
    """log(exp(lse) + the sum over `which` of exp(scaled)), softmax by softmax."""
    # The largest summand is taken out of the logarithm, so that the largest exponential is exp(0).
    most = tl.maximum(lse, tl.max(tl.where(which, scaled, LOWEST), 1))
    # The minimum is for entries outside `which`: they may exceed `most`, and infinity times 0 is NaN.
    part = tl.sum(tl.where(which, tl.exp(tl.minimum(scaled - most[:, None], 0.0)), 0.0), 1)
    return most + tl.log(tl.exp(lse - most) + part)


@triton.jit
def given(log_x_K, has):
    """Logprobs renormalised over the ids where `has` is true; LOG_FLOOR elsewhere."""
    # log x_k - lse over those ids, with their maximum taken out as in `with_ids`.
    largest = tl.max(tl.where(has, log_x_K, LOWEST), 0)
    total = tl.sum(tl.where(has, tl.exp(tl.minimum(log_x_K - largest, 0.0)), 0.0), 0)
    # A row without any has nothing to divide by, and its result is not used.
    total = tl.where(total > 0.0, total, 1.0)
    return tl.where(has, log_x_K - largest - tl.log(total), LOG_FLOOR)
