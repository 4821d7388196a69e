"""What the kernels do to one row of logits in Triton: raw products to logits, normalisers block by block, a support's
share of them. Called by `normalise`, `compare` and `gradient`; a row is one program's.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl

# The numbers of `passes.HOLE` and `supports.LOG_FLOOR`; a test holds them equal.
HOLE = tl.constexpr(-1e20)
LOG_FLOOR = tl.constexpr(-87.0)
# Below every logit and every hole, and still finite: a running maximum begins here.
LOWEST = tl.constexpr(-1e30)
# Of tables and counts that differ from one chunk to the next: no kernel is compiled for where they lie.
UNALIGNED = (
    "labels_ptr", "ids_ptr", "logprobs_ptr", "tails_ptr", "weights_ptr", "values_ptr", "rest_ptr", "row_ptr", "at_ptr",
    "at_label_ptr", "top_ptr", "lse_ptr", "totals_ptr", "ids0_ptr", "at0_ptr", "ids1_ptr", "at1_ptr", "ids2_ptr",
    "at2_ptr",
)  # fmt: skip
VARYING = ("rows", "K", "K0", "K1", "K2")


def kernel(function: Any) -> Any:
    """`triton.jit`, for whatever rows a chunk has."""
    names = inspect.signature(function).parameters
    return triton.jit(
        do_not_specialize=[name for name in VARYING if name in names],
        do_not_specialize_on_alignment=[name for name in UNALIGNED if name in names],
    )(function)


@triton.jit
def to_logits(raw, columns, inside, bias_ptr, HEAD: tl.constexpr):
    """Products to logits, z = cap(scale * (product + bias)); a hole stays one. HEAD: (1 if there is a bias, scale,
    softcap or 0).
    """
    x = raw
    if HEAD[0] == 1:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    x *= HEAD[1]
    if HEAD[2] > 0.0:
        # tanh |y| = (1 - exp(-2 |y|)) / (1 + exp(-2 |y|)): this exponential can't overflow. Then the sign put back.
        e = tl.exp(-2.0 * tl.abs(x) / HEAD[2])
        tanh = (1.0 - e) / (1.0 + e)
        x = HEAD[2] * tl.where(x < 0.0, -tanh, tanh)
    # A cap would make an ordinary logit of a hole. A tenth of it, since what stands there may have been rounded.
    return tl.where(raw < 0.1 * HOLE, HOLE, x)


@triton.jit
def by_softmax(SOFTMAXES: tl.constexpr, FIELD: tl.constexpr, PAD: tl.constexpr, DTYPE: tl.constexpr):
    """A field of every softmax as a vector [PAD]; 1 where there is none."""
    index = tl.arange(0, PAD)
    # A tuple of constants is no tensor that could be loaded: each is written to its place.
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
    """Entry s of a vector [S]. Triton indexes no tensor in registers, but it can add up what a mask leaves of one."""
    return tl.sum(tl.where(index == s, vector, 0.0), 0)


@triton.jit
def fold(x, largest, sums, inverse):
    """The largest logit so far and the sums [S, BLOCK] of exp((logit - largest) / T) with a block of logits added."""
    new = tl.maximum(largest, tl.max(x, 0))
    # What was summed relative to the old maximum is brought to the new one, softmax by softmax. One maximum serves all
    # temperatures: the largest logit is the largest at each of them.
    sums = sums * tl.exp((largest - new) * inverse)[:, None] + tl.exp((x - new)[None, :] * inverse[:, None])
    return new, sums


@triton.jit
def normaliser(largest, sums, inverse):
    """lse(z / T) of each softmax [S], from what `fold` has: max / T + log of the sum of exp((z - max) / T)."""
    return largest * inverse + tl.log(tl.sum(sums, 1))


@triton.jit
def add_block(
    z_row, bias_ptr, start, stop, inverse, largest, sums, top_id, HEAD: tl.constexpr, WANT_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(largest, sums, top_id) with the block of logits from `start` on added, as far as there are any before `stop`."""
    columns = start + tl.arange(0, BLOCK)
    raw = tl.load(z_row + columns, mask=columns < stop, other=0.0)
    x = to_logits(raw, columns, columns < stop, bias_ptr, HEAD)
    # What was loaded beyond the end adds exp(-inf) = 0.
    x = tl.where(columns < stop, x, float("-inf"))
    if WANT_TOP:
        block_top, block_id = tl.max(x, 0, return_indices=True)
        # Strictly larger: of equal logits the one that came first keeps its place.
        top_id = tl.where(block_top > largest, start + block_id, top_id)
    largest, sums = fold(x, largest, sums, inverse)
    return largest, sums, top_id


@triton.jit
def sweep(
    z_row, bias_ptr, W, V, inverse, wide, HEAD: tl.constexpr, WANT_TOP: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(normalisers [S] of all that stands in the row, largest logit, its id). Over all V ids where `wide`, else W."""
    top_id = 0
    largest = tl.full([], LOWEST, DTYPE)
    # A sum a thread's column, not one a row: columns are added up once, when the row is done.
    sums = tl.zeros([inverse.shape[0], BLOCK], DTYPE)
    for start in range(0, W, BLOCK):
        largest, sums, top_id = add_block(
            z_row, bias_ptr, start, W, inverse, largest, sums, top_id, HEAD, WANT_TOP, BLOCK
        )
    # The softmaxes over the W ids that student and teacher share are complete here.
    narrow = normaliser(largest, sums, inverse)
    for start in range(W, V, BLOCK):  # ids that only the label's softmax knows
        largest, sums, top_id = add_block(
            z_row, bias_ptr, start, V, inverse, largest, sums, top_id, HEAD, WANT_TOP, BLOCK
        )
    return tl.where(wide > 0.0, normaliser(largest, sums, inverse), narrow), largest, top_id


@triton.jit
def sweep_without(
    z_row, ids, raw_K, live, bias_ptr, W, V, inverse, wide, HEAD: tl.constexpr, WANT_TOP: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`sweep` of the row without the products `raw_K` at `ids`, which are put back after it: 1 - sum over K of q would
    lose the digits of a small tail, so the tail is summed by itself.
    """
    # Every thread has read what it wants before any writes, and all have written before any reads on.
    tl.debug_barrier()
    tl.store(z_row + ids, HOLE, mask=live)
    tl.debug_barrier()
    rest, largest, top_id = sweep(z_row, bias_ptr, W, V, inverse, wide, HEAD, WANT_TOP, BLOCK, DTYPE)
    tl.debug_barrier()
    tl.store(z_row + ids, raw_K, mask=live)
    return rest, largest, top_id


@triton.jit
def most_likely(x_K, ids, live, largest, top_id, V):
    """The id of the row's largest logit: the sweep's, or one of those that were taken out for it."""
    at_top = tl.max(tl.where(live, x_K, LOWEST), 0)
    # Of several that are equal, the least id.
    at_id = tl.min(tl.where(live & (x_K == at_top), ids, V), 0)
    wins = (at_top > largest) | ((at_top == largest) & (at_id < top_id))
    return tl.where(wins, at_id, top_id).to(tl.int64)


@triton.jit
def with_ids(lse, scaled, which):
    """log(exp(lse) + the sum over `which` of exp(scaled)), softmax by softmax."""
    # The largest of all summands is taken out of the logarithm, so that the largest exponential is exp(0).
    most = tl.maximum(lse, tl.max(tl.where(which, scaled, LOWEST), 1))
    # The minimum is for what `which` leaves out: it may be larger than `most`, and infinity times 0 is NaN.
    part = tl.sum(tl.where(which, tl.exp(tl.minimum(scaled - most[:, None], 0.0)), 0.0), 1)
    return most + tl.log(tl.exp(lse - most) + part)


@triton.jit
def given(log_x_K, has):
    """Logprobs given that the token is one of those that `has` names; LOG_FLOOR elsewhere."""
    # log x_k - lse over the ids that there are, with their maximum taken out of it as in `with_ids`.
    largest = tl.max(tl.where(has, log_x_K, LOWEST), 0)
    total = tl.sum(tl.where(has, tl.exp(tl.minimum(log_x_K - largest, 0.0)), 0.0), 0)
    # A row without any has nothing to divide by, and no use of the result.
    total = tl.where(total > 0.0, total, 1.0)
    return tl.where(has, log_x_K - largest - tl.log(total), LOG_FLOOR)
