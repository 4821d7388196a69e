"""One sweep over a row's logits in Triton: every softmax's normaliser, then all terms on a support or the label.

Launched by `launch`, one program a row. `passes` is the reference; its formulas are those of this kernel.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl

from student_trainer.losses.fused.divergences import divergence

# The numbers of `sweeps.HOLE` and `supports.LOG_FLOOR`; a test holds them equal.
HOLE = tl.constexpr(-1e20)
LOG_FLOOR = tl.constexpr(-87.0)
# How a term is computed: of the label, with the rest in a bucket, given that the token is in the support, or on the
# support's ids alone.
LABEL, BUCKET, RENORMALISE, PLAIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# Below every logit and every hole, and still finite: a running maximum begins here.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def to_logits(raw, columns, inside, bias_ptr, HEAD: tl.constexpr):
    """Products to logits; a hole stays one. HEAD: (1 if there is a bias, scale, softcap or 0)."""
    x = raw
    if HEAD[0] == 1:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    x *= HEAD[1]
    if HEAD[2] > 0.0:
        # tanh of |x| by an exponential that can't overflow, with the sign put back.
        e = tl.exp(-2.0 * tl.abs(x) / HEAD[2])
        tanh = (1.0 - e) / (1.0 + e)
        x = HEAD[2] * tl.where(x < 0.0, -tanh, tanh)
    return tl.where(raw < 0.1 * HOLE, HOLE, x)


@triton.jit
def by_softmax(SOFTMAXES: tl.constexpr, FIELD: tl.constexpr, PAD: tl.constexpr, DTYPE: tl.constexpr):
    """A field of every softmax as a vector [PAD]; 1 where there is none."""
    index = tl.arange(0, PAD)
    out = tl.full([PAD], 1.0, DTYPE)
    for s in tl.static_range(len(SOFTMAXES)):
        out = tl.where(index == s, SOFTMAXES[s][FIELD], out)
    return out


@triton.jit
def fold(x, largest, sums, inverse):
    """The largest logit so far and the sums [S, BLOCK] of exp((logit - largest) / T) with a block of logits added."""
    new = tl.maximum(largest, tl.max(x, 0))
    sums = sums * tl.exp((largest - new) * inverse)[:, None] + tl.exp((x - new)[None, :] * inverse[:, None])
    return new, sums


@triton.jit
def pick(table, index, s):
    """Row s of a table [S, K]."""
    return tl.sum(tl.where(index[:, None] == s, table, 0.0), 0)


@triton.jit
def add_block(
    z_row, bias_ptr, start, stop, inverse, largest, sums, top_id, HEAD: tl.constexpr, WANT_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(largest, sums, top_id) with the block of logits from `start` on added, as far as there are any before `stop`."""
    columns = start + tl.arange(0, BLOCK)
    raw = tl.load(z_row + columns, mask=columns < stop, other=0.0)
    x = to_logits(raw, columns, columns < stop, bias_ptr, HEAD)
    x = tl.where(columns < stop, x, float("-inf"))
    if WANT_TOP:
        block_top, block_id = tl.max(x, 0, return_indices=True)
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
    sums = tl.zeros([inverse.shape[0], BLOCK], DTYPE)
    for start in range(0, W, BLOCK):
        largest, sums, top_id = add_block(
            z_row, bias_ptr, start, W, inverse, largest, sums, top_id, HEAD, WANT_TOP, BLOCK
        )
    narrow = largest * inverse + tl.log(tl.sum(sums, 1))
    for start in range(W, V, BLOCK):  # ids that only the label's softmax knows
        largest, sums, top_id = add_block(
            z_row, bias_ptr, start, V, inverse, largest, sums, top_id, HEAD, WANT_TOP, BLOCK
        )
    return tl.where(wide > 0.0, largest * inverse + tl.log(tl.sum(sums, 1)), narrow), largest, top_id


@triton.jit
def with_ids(lse, scaled, which):
    """log(exp(lse) + the sum over `which` of exp(scaled)), softmax by softmax."""
    most = tl.maximum(lse, tl.max(tl.where(which, scaled, LOWEST), 1))
    part = tl.sum(tl.where(which, tl.exp(tl.minimum(scaled - most[:, None], 0.0)), 0.0), 1)
    return most + tl.log(tl.exp(lse - most) + part)


@triton.jit
def given(log_x_K, has):
    """Logprobs given that the token is one of those that `has` names; LOG_FLOOR elsewhere."""
    largest = tl.max(tl.where(has, log_x_K, LOWEST), 0)
    total = tl.sum(tl.where(has, tl.exp(tl.minimum(log_x_K - largest, 0.0)), 0.0), 0)
    # A row without any has nothing to divide by, and no use of the result.
    total = tl.where(total > 0.0, total, 1.0)
    return tl.where(has, log_x_K - largest - tl.log(total), LOG_FLOOR)


@triton.jit
def on_support(log_p_K, log_q_K, has, log_p_tail, log_q_tail, log_mass, TERMS: tl.constexpr, M: tl.constexpr):
    """Term M's (value, sum of slopes that is spread over the softmax, slopes at the ids, slope of the tail)."""
    if TERMS[M][3] == RENORMALISE:
        log_p_K = given(log_p_K, has)
        log_q_K = given(log_q_K, has)
    elif TERMS[M][3] == BUCKET:
        log_p_K = tl.where(has, log_p_K - log_mass, LOG_FLOOR)
    value_K, slope_K = divergence(log_p_K, log_q_K, TERMS[M][0], TERMS[M][5], TERMS[M][6], TERMS[M][7])
    slope_K = tl.where(has, slope_K, 0.0)
    value = tl.sum(tl.where(has, value_K, 0.0), 0)
    total = tl.sum(slope_K, 0)
    on_tail = total * 0.0
    if TERMS[M][3] == RENORMALISE:
        slope_K -= tl.where(has, tl.exp(log_q_K), 0.0) * total
        total = on_tail
    elif TERMS[M][3] == BUCKET:
        value_tail, on_tail = divergence(
            log_p_tail - log_mass, log_q_tail, TERMS[M][0], TERMS[M][5], TERMS[M][6], TERMS[M][7]
        )
        value += value_tail
        total += on_tail
    return value, total, slope_K, on_tail


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


@kernel
def normalise(
    z_ptr, z_stride, bias_ptr, labels_ptr, ids_ptr, logprobs_ptr, tails_ptr, weights_ptr,
    values_ptr, rest_ptr, row_ptr, at_ptr, at_label_ptr, top_ptr,
    rows, K, V, W,
    SOFTMAXES: tl.constexpr, TERMS: tl.constexpr, HEAD: tl.constexpr,
    WANT_TOP: tl.constexpr, HAS_LABEL: tl.constexpr, S_PAD: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One support's softmaxes, and the terms on them.

    SOFTMAXES: (1 / T, 1 if over all V ids else 0, which of the support's tables or -1 without support, which row of
    `rest` and `row`). TERMS: (kind, softmax, row of `weights` and `values`, form, T^2 or 1, log A, log(1 - A), A, its
    softmax's table), kind and form as numbers. `ids`: [rows, K], -1 where nothing stands;
    `logprobs`: [tables, rows, K], LOG_FLOOR where the table has no use of the id; `tails`: [tables, 2, rows], the
    tail's logprob and the logarithm of the whole mass. Out go, by softmax, `rest`, the normaliser without the support,
    and `row`, the gradient of a logit outside the support over its share of that; `at`: [rows, K], the gradient at the
    support's ids, by the softmaxes that have this support; `at_label`.
    """
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    index = tl.arange(0, S_PAD)
    slot = tl.arange(0, K_PAD)
    inverse = by_softmax(SOFTMAXES, 0, S_PAD, DTYPE)
    label = tl.load(labels_ptr + row)
    label_x = to_logits(tl.load(z_row + label), label, True, bias_ptr, HEAD)
    ids = tl.load(ids_ptr + row * K + slot, mask=slot < K, other=-1)
    live = ids >= 0
    at_raw = tl.load(z_row + ids, mask=live, other=HOLE)
    x_K = to_logits(at_raw, ids, live, bias_ptr, HEAD)
    # Which softmax has which id in its support.
    own = tl.zeros([S_PAD, K_PAD], tl.int1)
    for s in tl.static_range(len(SOFTMAXES)):
        if SOFTMAXES[s][2] >= 0:
            log_p = tl.load(logprobs_ptr + (SOFTMAXES[s][2] * rows + row) * K + slot, mask=live, other=LOG_FLOOR)
            own |= (index[:, None] == s) & (log_p > LOG_FLOOR)[None, :]
    # The support's logits leave the row for the sweep: one minus the rest would lose the digits of a small tail. Every
    # thread has read what it wants before any writes, and all have written before any reads on.
    tl.debug_barrier()
    tl.store(z_row + ids, HOLE, mask=live)
    tl.debug_barrier()
    wide = by_softmax(SOFTMAXES, 1, S_PAD, DTYPE)
    rest, largest, top_id = sweep(z_row, bias_ptr, W, V, inverse, wide, HEAD, WANT_TOP, BLOCK, DTYPE)
    tl.debug_barrier()
    tl.store(z_row + ids, at_raw, mask=live)
    if WANT_TOP:
        at_top = tl.max(tl.where(live, x_K, LOWEST), 0)
        # Of several that are equal, the least id.
        at_id = tl.min(tl.where(live & (x_K == at_top), ids, V), 0)
        wins = (at_top > largest) | ((at_top == largest) & (at_id < top_id))
        tl.store(top_ptr + row, tl.where(wins, at_id, top_id).to(tl.int64))

    scaled = x_K[None, :] * inverse[:, None]
    # An id that was taken out for another softmax belongs to this one's rest.
    rest = with_ids(rest, scaled, live[None, :] & (own == 0))
    lse = with_ids(rest, scaled, own)
    log_q = tl.where(own, scaled - lse[:, None], LOG_FLOOR)
    log_tail = rest - lse
    # What the terms ask for: everywhere (times q), on the tail (times q within it), at ids, at the label.
    spread = tl.zeros([S_PAD], DTYPE)
    on_tail = tl.zeros([S_PAD], DTYPE)
    at = tl.zeros([S_PAD, K_PAD], DTYPE)
    at_label = tl.full([], 0.0, DTYPE)
    for m in tl.static_range(len(TERMS)):
        weight = tl.load(weights_ptr + TERMS[m][2] * rows + row)
        if TERMS[m][3] == LABEL:
            value = tl.sum(tl.where(index == TERMS[m][1], lse, 0.0), 0) - label_x
            spread += tl.where(index == TERMS[m][1], weight, 0.0)
            at_label -= weight
        else:
            log_p_K = tl.load(logprobs_ptr + (TERMS[m][8] * rows + row) * K + slot, mask=live, other=LOG_FLOOR)
            value, total, slope_K, slope_tail = on_support(
                log_p_K, pick(log_q, index, TERMS[m][1]), log_p_K > LOG_FLOOR,
                tl.load(tails_ptr + TERMS[m][8] * 2 * rows + row),
                tl.sum(tl.where(index == TERMS[m][1], log_tail, 0.0), 0),
                tl.load(tails_ptr + (TERMS[m][8] * 2 + 1) * rows + row), TERMS, m,
            )  # fmt: skip
            spread -= tl.where(index == TERMS[m][1], weight * total, 0.0)
            on_tail += tl.where(index == TERMS[m][1], weight * slope_tail, 0.0)
            at += tl.where(index[:, None] == TERMS[m][1], (weight * slope_K)[None, :], 0.0)
        tl.store(values_ptr + TERMS[m][2] * rows + row, value * TERMS[m][4])

    per_row = (spread * tl.exp(log_tail) + on_tail) * inverse
    # At an id: its own slope and its share of what is spread, or, outside a softmax's support, as anywhere.
    inside = (at + tl.exp(log_q) * spread[:, None]) * inverse[:, None]
    outside = per_row[:, None] * tl.exp(tl.minimum(scaled - rest[:, None], 0.0))
    total_at = tl.zeros([K_PAD], DTYPE)
    for s in tl.static_range(len(SOFTMAXES)):
        if SOFTMAXES[s][2] >= 0:
            total_at += pick(tl.where(own, inside, outside), index, s)
        tl.store(rest_ptr + SOFTMAXES[s][3] * rows + row, tl.sum(tl.where(index == s, rest, 0.0), 0))
        tl.store(row_ptr + SOFTMAXES[s][3] * rows + row, tl.sum(tl.where(index == s, per_row, 0.0), 0))
    tl.store(at_ptr + row * K + slot, total_at, mask=live)
    if HAS_LABEL:
        tl.store(at_label_ptr + row, at_label)
