"""Terms over the whole vocabulary in Triton, in two sweeps over a row of the student's and of the teacher's logits.

`compare` is launched by `launch`, one program per row; `compared` is its part in `gradient`. `passes` is the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from student_trainer.losses.fused.divergences import divergence
from student_trainer.losses.fused.row_functions import LOWEST, by_softmax, fold, kernel, normaliser, pick_one, to_logits


@triton.jit
def load_logits(row_ptr, columns, inside, bias_ptr, HEAD: tl.constexpr):
    """A block of a row's products, as logits."""
    return to_logits(tl.load(row_ptr + columns, mask=inside, other=0.0), columns, inside, bias_ptr, HEAD)


@triton.jit
def both_normalisers(
    z_row, bias_ptr, teacher_row, teacher_bias_ptr, W, inverse, HEAD: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """lse(z / T) of student and teacher, one per temperature [S], in one sweep over both rows."""
    largest = tl.full([], LOWEST, DTYPE)
    teacher_largest = tl.full([], LOWEST, DTYPE)
    sums = tl.zeros([inverse.shape[0], BLOCK], DTYPE)
    teacher_sums = tl.zeros([inverse.shape[0], BLOCK], DTYPE)
    for start in range(0, W, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < W
        # Columns past the end add exp(-inf) = 0.
        x = load_logits(z_row, columns, inside, bias_ptr, HEAD)
        largest, sums = fold(tl.where(inside, x, float("-inf")), largest, sums, inverse)
        t = load_logits(teacher_row, columns, inside, teacher_bias_ptr, TEACHER)
        teacher_largest, teacher_sums = fold(tl.where(inside, t, float("-inf")), teacher_largest, teacher_sums, inverse)
    return normaliser(largest, sums, inverse), normaliser(teacher_largest, teacher_sums, inverse)


@triton.jit
def summed_terms(
    z_row, bias_ptr, teacher_row, teacher_bias_ptr, W, lse, teacher_lse, index, TEMPERATURES: tl.constexpr,
    TERMS: tl.constexpr, HEAD: tl.constexpr, TEACHER: tl.constexpr, M_PAD: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """By term [M], its value and its slopes, each summed over the row: a second sweep, since log p and log q need the
    normalisers of the whole row.
    """
    term = tl.arange(0, M_PAD)[:, None]
    values = tl.zeros([M_PAD, BLOCK], DTYPE)
    totals = tl.zeros([M_PAD, BLOCK], DTYPE)
    for start in range(0, W, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < W
        x = load_logits(z_row, columns, inside, bias_ptr, HEAD)
        t = load_logits(teacher_row, columns, inside, teacher_bias_ptr, TEACHER)
        for m in tl.static_range(len(TERMS)):
            # log q = z / T - lse(z / T): every id is a bucket of its own.
            log_q = x * TEMPERATURES[TERMS[m][1]][0] - pick_one(lse, index, TERMS[m][1])
            log_p = t * TEMPERATURES[TERMS[m][1]][0] - pick_one(teacher_lse, index, TERMS[m][1])
            value, slope = divergence(log_p, log_q, TERMS[m][0], TERMS[m][4], TERMS[m][5], TERMS[m][6])
            values += tl.where(term == m, tl.where(inside, value, 0.0)[None, :], 0.0)
            totals += tl.where(term == m, tl.where(inside, slope, 0.0)[None, :], 0.0)
    return tl.sum(values, 1), tl.sum(totals, 1)


@kernel
def compare(
    z_ptr, z_stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, weights_ptr, values_ptr,
    lse_ptr, totals_ptr, rows, W,
    TEMPERATURES: tl.constexpr, TERMS: tl.constexpr, HEAD: tl.constexpr, TEACHER: tl.constexpr,
    S_PAD: tl.constexpr, M_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Terms over the W ids that student and teacher share: every id is a bucket.

    TEMPERATURES: (1 / T,). TERMS: (kind, temperature, row of `weights` and `values`, T^2 or 1, log A, log(1 - A), A).
    Writes `lse`: [2 temperatures, rows], at each temperature the student's and then the teacher's; `totals`: [terms,
    rows], each term's slopes summed over the row; and the values.
    """
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z_row, teacher_row = z_ptr + row * z_stride, teacher_ptr + row * teacher_stride
    index = tl.arange(0, S_PAD)
    inverse = by_softmax(TEMPERATURES, 0, S_PAD, DTYPE)
    lse, teacher_lse = both_normalisers(
        z_row, bias_ptr, teacher_row, teacher_bias_ptr, W, inverse, HEAD, TEACHER, BLOCK, DTYPE
    )
    for d in tl.static_range(len(TEMPERATURES)):
        tl.store(lse_ptr + 2 * d * rows + row, pick_one(lse, index, d))
        tl.store(lse_ptr + (2 * d + 1) * rows + row, pick_one(teacher_lse, index, d))
    values_M, totals_M = summed_terms(
        z_row, bias_ptr, teacher_row, teacher_bias_ptr, W, lse, teacher_lse, index, TEMPERATURES, TERMS, HEAD, TEACHER,
        M_PAD, BLOCK, DTYPE,
    )  # fmt: skip
    term = tl.arange(0, M_PAD)
    for m in tl.static_range(len(TERMS)):
        tl.store(values_ptr + TERMS[m][2] * rows + row, pick_one(values_M, term, m) * TERMS[m][3])
        tl.store(totals_ptr + m * rows + row, pick_one(totals_M, term, m))


@triton.jit
def compared(
    x, columns, inside, teacher_row, teacher_bias_ptr, weights_ptr, lse_ptr, totals_ptr,
    rows, row, DENSE: tl.constexpr, TEMPERATURES: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The gradient of the terms of `compare` with respect to logits x: sum over terms of w / T (g_j - q_j sum g)."""
    t = load_logits(teacher_row, columns, inside, teacher_bias_ptr, TEACHER)
    out = tl.zeros_like(x)
    for m in tl.static_range(len(DENSE)):
        weight = tl.load(weights_ptr + DENSE[m][2] * rows + row)
        log_q = x * TEMPERATURES[DENSE[m][1]][0] - tl.load(lse_ptr + 2 * DENSE[m][1] * rows + row)
        log_p = t * TEMPERATURES[DENSE[m][1]][0] - tl.load(lse_ptr + (2 * DENSE[m][1] + 1) * rows + row)
        # The slopes are computed again: keeping them would take an array as wide as the vocabulary per term.
        _value, slope = divergence(log_p, log_q, DENSE[m][0], DENSE[m][4], DENSE[m][5], DENSE[m][6])
        out += weight * TEMPERATURES[DENSE[m][1]][0] * (slope - tl.exp(log_q) * tl.load(totals_ptr + m * rows + row))
    return tl.where(inside, out, 0.0)
