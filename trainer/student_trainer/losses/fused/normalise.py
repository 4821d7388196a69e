"""The normaliser of every softmax in one sweep over a row's logits in Triton, then all terms on a support or the label.

Launched by `launch`, one program per row. `passes` is the reference: this kernel has the same formulas, and the same
names for the parts of a gradient: `spread`, `on_tail`, `at`, `at_label`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from student_trainer.losses.fused.divergences import divergence
from student_trainer.losses.fused.row_functions import (
    HOLE,
    LOG_FLOOR,
    by_softmax,
    given,
    kernel,
    most_likely,
    pick,
    pick_one,
    sweep_without,
    to_logits,
    with_ids,
)

# How a term is computed: at the label, with the rest in a bucket, renormalised over the support, or on the support's
# ids alone.
LABEL, BUCKET, RENORMALISE, PLAIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def supported(logprobs_ptr, rows, row, K, slot, live, index, SOFTMAXES: tl.constexpr):
    """[S, K]: whether softmax s has id k in its support, that is, whether its table has a teacher logprob there."""
    own = tl.zeros([index.shape[0], slot.shape[0]], tl.int1)
    for s in tl.static_range(len(SOFTMAXES)):
        if SOFTMAXES[s][2] >= 0:
            log_p = tl.load(logprobs_ptr + (SOFTMAXES[s][2] * rows + row) * K + slot, mask=live, other=LOG_FLOOR)
            own |= (index[:, None] == s) & (log_p > LOG_FLOOR)[None, :]
    return own


@triton.jit
def on_support(log_p_K, log_q_K, has, log_p_tail, log_q_tail, log_mass, TERMS: tl.constexpr, M: tl.constexpr):
    """Term M's (value, sum of slopes, which is spread over the softmax, slopes at the ids, slope of the tail). A slope
    is g = d value / d log q of a bucket.
    """
    if TERMS[M][3] == RENORMALISE:
        # Both distributions renormalised over the support: p / sum p and q / sum q over the ids.
        log_p_K = given(log_p_K, has)
        log_q_K = given(log_q_K, has)
    elif TERMS[M][3] == BUCKET:
        # Ids and tail divided by their total mass, which rounding and bounds move off 1: see `supports.with_tail`.
        log_p_K = tl.where(has, log_p_K - log_mass, LOG_FLOOR)
    value_K, slope_K = divergence(log_p_K, log_q_K, TERMS[M][0], TERMS[M][5], TERMS[M][6], TERMS[M][7])
    slope_K = tl.where(has, slope_K, 0.0)
    value = tl.sum(tl.where(has, value_K, 0.0), 0)
    total = tl.sum(slope_K, 0)
    on_tail = total * 0.0
    if TERMS[M][3] == RENORMALISE:
        # q here is a softmax over the support alone: d value / d z_k = g_k - q_k sum g, and 0 outside the support.
        slope_K -= tl.where(has, tl.exp(log_q_K), 0.0) * total
        total = on_tail
    elif TERMS[M][3] == BUCKET:
        # Everything outside the support, as one more bucket.
        value_tail, on_tail = divergence(
            log_p_tail - log_mass, log_q_tail, TERMS[M][0], TERMS[M][5], TERMS[M][6], TERMS[M][7]
        )
        value += value_tail
        total += on_tail
    return value, total, slope_K, on_tail


@triton.jit
def on_terms(
    lse, log_q, log_tail, label_x, live, logprobs_ptr, tails_ptr, weights_ptr, values_ptr, rows, row, K, index, slot,
    TERMS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the terms' values. Returns the parts of their gradient, each times its weight: everywhere (times q) and on
    the tail (times q within the tail) [S], at ids [S, K], at the label.
    """
    spread = tl.zeros([log_q.shape[0]], DTYPE)
    on_tail = tl.zeros([log_q.shape[0]], DTYPE)
    at = tl.zeros([log_q.shape[0], log_q.shape[1]], DTYPE)
    at_label = tl.full([], 0.0, DTYPE)
    for m in tl.static_range(len(TERMS)):
        # coefficient x T^2 x weight of the row; 0 on a row that does not count for the term.
        weight = tl.load(weights_ptr + TERMS[m][2] * rows + row)
        if TERMS[m][3] == LABEL:
            # -log q(label) = lse - z(label), whose gradient is q everywhere and -1 at the label.
            value = pick_one(lse, index, TERMS[m][1]) - label_x
            spread += tl.where(index == TERMS[m][1], weight, 0.0)
            at_label -= weight
        else:
            log_p_K = tl.load(logprobs_ptr + (TERMS[m][8] * rows + row) * K + slot, mask=live, other=LOG_FLOOR)
            value, total, slope_K, slope_tail = on_support(
                log_p_K, pick(log_q, index, TERMS[m][1]), log_p_K > LOG_FLOOR,
                tl.load(tails_ptr + TERMS[m][8] * 2 * rows + row), pick_one(log_tail, index, TERMS[m][1]),
                tl.load(tails_ptr + (TERMS[m][8] * 2 + 1) * rows + row), TERMS, m,
            )  # fmt: skip
            # d value / d z_j = g_j - q_j sum g at an id, (g_tail / q_tail - sum g) q_j on the tail.
            spread -= tl.where(index == TERMS[m][1], weight * total, 0.0)
            on_tail += tl.where(index == TERMS[m][1], weight * slope_tail, 0.0)
            at += tl.where(index[:, None] == TERMS[m][1], (weight * slope_K)[None, :], 0.0)
        tl.store(values_ptr + TERMS[m][2] * rows + row, value * TERMS[m][4])
    return spread, on_tail, at, at_label


@triton.jit
def write_gradient(
    spread, on_tail, at, scaled, log_q, rest, log_tail, own, live, inverse, rest_ptr, row_ptr, at_ptr, rows, row, K,
    index, slot, SOFTMAXES: tl.constexpr,
):  # fmt: skip
    """Writes what `gradient` needs of the row: by softmax, the normaliser of the rest and one number for all of the
    rest; and the sum over the softmaxes at each of the support's ids.
    """
    # Outside the support, where q_j = exp(log_tail) exp(z_j / T - rest), all ids share one number: the spread part
    # times the tail's mass, plus the tail's own part. 1 / T, since softmaxes are of z / T.
    per_row = (spread * tl.exp(log_tail) + on_tail) * inverse
    # At an id: its own slope and its share of the spread part or, outside a softmax's support, the same as elsewhere.
    inside = (at + tl.exp(log_q) * spread[:, None]) * inverse[:, None]
    outside = per_row[:, None] * tl.exp(tl.minimum(scaled - rest[:, None], 0.0))
    total_at = tl.zeros([slot.shape[0]], at.dtype)
    for s in tl.static_range(len(SOFTMAXES)):
        if SOFTMAXES[s][2] >= 0:
            total_at += pick(tl.where(own, inside, outside), index, s)
        tl.store(rest_ptr + SOFTMAXES[s][3] * rows + row, pick_one(rest, index, s))
        tl.store(row_ptr + SOFTMAXES[s][3] * rows + row, pick_one(per_row, index, s))
    tl.store(at_ptr + row * K + slot, total_at, mask=live)


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
    softmax's table), kind and form as numbers. `ids`: [rows, K], -1 for none; `logprobs`: [tables, rows, K], LOG_FLOOR
    where the table does not use the id; `tails`: [tables, 2, rows], the tail's logprob and the logarithm of the total
    mass. Writes, by softmax, `rest`, the normaliser without the support, and `row`, the gradient of a logit outside the
    support divided by its share of the rest; `at`: [rows, K], the gradient at the support's ids from the softmaxes that
    have this support; and `at_label`.
    """
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # rows times the vocabulary may be more than 2^31
    z_row = z_ptr + row * z_stride
    # A vector has one entry per softmax (`index`) or per id of the support (`slot`), padded to a power of two.
    index = tl.arange(0, S_PAD)
    slot = tl.arange(0, K_PAD)
    inverse = by_softmax(SOFTMAXES, 0, S_PAD, DTYPE)
    wide = by_softmax(SOFTMAXES, 1, S_PAD, DTYPE)
    label = tl.load(labels_ptr + row)
    label_x = to_logits(tl.load(z_row + label), label, True, bias_ptr, HEAD)
    ids = tl.load(ids_ptr + row * K + slot, mask=slot < K, other=-1)
    live = ids >= 0
    raw_K = tl.load(z_row + ids, mask=live, other=HOLE)
    x_K = to_logits(raw_K, ids, live, bias_ptr, HEAD)
    own = supported(logprobs_ptr, rows, row, K, slot, live, index, SOFTMAXES)
    rest, largest, top_id = sweep_without(
        z_row, ids, raw_K, live, bias_ptr, W, V, inverse, wide, HEAD, WANT_TOP, BLOCK, DTYPE
    )
    if WANT_TOP:
        tl.store(top_ptr + row, most_likely(x_K, ids, live, largest, top_id, V))

    scaled = x_K[None, :] * inverse[:, None]
    # An id that was taken out only for another softmax belongs to this one's rest.
    rest = with_ids(rest, scaled, live[None, :] & (own == 0))
    lse = with_ids(rest, scaled, own)
    log_q = tl.where(own, scaled - lse[:, None], LOG_FLOOR)
    log_tail = rest - lse
    spread, on_tail, at, at_label = on_terms(
        lse, log_q, log_tail, label_x, live, logprobs_ptr, tails_ptr, weights_ptr, values_ptr, rows, row, K, index,
        slot, TERMS, DTYPE,
    )  # fmt: skip
    write_gradient(
        spread, on_tail, at, scaled, log_q, rest, log_tail, own, live, inverse, rest_ptr, row_ptr, at_ptr, rows, row,
        K, index, slot, SOFTMAXES,
    )  # fmt: skip
    if HAS_LABEL:
        tl.store(at_label_ptr + row, at_label)
