"""The gradient by the logits in one sweep over a row in Triton, and terms over the whole vocabulary in two more.

Launched by `launch`, one program a row, after `normalise`. `passes` is the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from student_trainer.losses.fused.divergences import divergence
from student_trainer.losses.fused.normalise import LOWEST, by_softmax, fold, kernel, to_logits

ALL = tl.constexpr(-2)  # a group's number that stands for all groups


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
    Out go `lse`: [2 temperatures, rows], the student's then the teacher's; `totals`: [terms, rows], each term's slopes
    summed over the row; and the values.
    """
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z_row, teacher_row = z_ptr + row * z_stride, teacher_ptr + row * teacher_stride
    index = tl.arange(0, S_PAD)
    inverse = by_softmax(TEMPERATURES, 0, S_PAD, DTYPE)
    largest = tl.full([], LOWEST, DTYPE)
    teacher_largest = tl.full([], LOWEST, DTYPE)
    sums = tl.zeros([S_PAD, BLOCK], DTYPE)
    teacher_sums = tl.zeros([S_PAD, BLOCK], DTYPE)
    for start in range(0, W, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < W
        raw = tl.load(z_row + columns, mask=inside, other=0.0)
        x = to_logits(raw, columns, inside, bias_ptr, HEAD)
        x = tl.where(inside, x, float("-inf"))
        largest, sums = fold(x, largest, sums, inverse)
        raw = tl.load(teacher_row + columns, mask=inside, other=0.0)
        x = to_logits(raw, columns, inside, teacher_bias_ptr, TEACHER)
        x = tl.where(inside, x, float("-inf"))
        teacher_largest, teacher_sums = fold(x, teacher_largest, teacher_sums, inverse)
    lse = largest * inverse + tl.log(tl.sum(sums, 1))
    teacher_lse = teacher_largest * inverse + tl.log(tl.sum(teacher_sums, 1))
    for d in tl.static_range(len(TEMPERATURES)):
        tl.store(lse_ptr + 2 * d * rows + row, tl.sum(tl.where(index == d, lse, 0.0), 0))
        tl.store(lse_ptr + (2 * d + 1) * rows + row, tl.sum(tl.where(index == d, teacher_lse, 0.0), 0))

    term = tl.arange(0, M_PAD)[:, None]
    values = tl.zeros([M_PAD, BLOCK], DTYPE)
    totals = tl.zeros([M_PAD, BLOCK], DTYPE)
    for start in range(0, W, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < W
        raw = tl.load(z_row + columns, mask=inside, other=0.0)
        x = to_logits(raw, columns, inside, bias_ptr, HEAD)
        raw = tl.load(teacher_row + columns, mask=inside, other=0.0)
        t = to_logits(raw, columns, inside, teacher_bias_ptr, TEACHER)
        for m in tl.static_range(len(TERMS)):
            log_q = x * TEMPERATURES[TERMS[m][1]][0] - tl.sum(tl.where(index == TERMS[m][1], lse, 0.0), 0)
            log_p = t * TEMPERATURES[TERMS[m][1]][0] - tl.sum(tl.where(index == TERMS[m][1], teacher_lse, 0.0), 0)
            value, slope = divergence(log_p, log_q, TERMS[m][0], TERMS[m][4], TERMS[m][5], TERMS[m][6])
            values += tl.where(term == m, tl.where(inside, value, 0.0)[None, :], 0.0)
            totals += tl.where(term == m, tl.where(inside, slope, 0.0)[None, :], 0.0)
    values_M, totals_M = tl.sum(values, 1), tl.sum(totals, 1)
    for m in tl.static_range(len(TERMS)):
        one = tl.arange(0, M_PAD) == m
        tl.store(values_ptr + TERMS[m][2] * rows + row, tl.sum(tl.where(one, values_M, 0.0), 0) * TERMS[m][3])
        tl.store(totals_ptr + m * rows + row, tl.sum(tl.where(one, totals_M, 0.0), 0))


@triton.jit
def spread_of(x, columns, W, rest_ptr, row_ptr, rows, row, SOFTMAXES: tl.constexpr, GROUP: tl.constexpr):
    """The gradient by logits x that a group's softmaxes (ALL: every group's) give to what is outside their support."""
    out = tl.zeros_like(x)
    for s in tl.static_range(len(SOFTMAXES)):
        if GROUP == ALL or SOFTMAXES[s][2] == GROUP:
            rest = tl.load(rest_ptr + s * rows + row)
            per_row = tl.load(row_ptr + s * rows + row)
            # Above 0 only at ids of the support, whose gradient is written later: no infinity is made of them.
            part = per_row * tl.exp(tl.minimum(x * SOFTMAXES[s][0] - rest, 0.0))
            if SOFTMAXES[s][1] == 0:
                part = tl.where(columns < W, part, 0.0)
            out += part
    return out


@triton.jit
def compared(
    x, columns, inside, teacher_row, teacher_bias_ptr, weights_ptr, lse_ptr, totals_ptr,
    rows, row, DENSE: tl.constexpr, TEMPERATURES: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The gradient by logits x of the terms of `compare`."""
    raw = tl.load(teacher_row + columns, mask=inside, other=0.0)
    t = to_logits(raw, columns, inside, teacher_bias_ptr, TEACHER)
    out = tl.zeros_like(x)
    for m in tl.static_range(len(DENSE)):
        weight = tl.load(weights_ptr + DENSE[m][2] * rows + row)
        log_q = x * TEMPERATURES[DENSE[m][1]][0] - tl.load(lse_ptr + 2 * DENSE[m][1] * rows + row)
        log_p = t * TEMPERATURES[DENSE[m][1]][0] - tl.load(lse_ptr + (2 * DENSE[m][1] + 1) * rows + row)
        _value, slope = divergence(log_p, log_q, DENSE[m][0], DENSE[m][4], DENSE[m][5], DENSE[m][6])
        out += weight * TEMPERATURES[DENSE[m][1]][0] * (slope - tl.exp(log_q) * tl.load(totals_ptr + m * rows + row))
    return tl.where(inside, out, 0.0)


@triton.jit
def chain(x, HEAD: tl.constexpr):
    """d logit / d product, at logit x."""
    out = tl.zeros_like(x) + HEAD[1]
    if HEAD[2] > 0.0:
        out *= 1.0 - (x / HEAD[2]) * (x / HEAD[2])
    return out


@triton.jit
def entries(z_row, ids_ptr, at_ptr, K, row, PAD: tl.constexpr):
    """A support's ids on a row, the gradient there, and the products."""
    slot = tl.arange(0, PAD)
    ids = tl.load(ids_ptr + row * K + slot, mask=slot < K, other=-1)
    at = tl.load(at_ptr + row * K + slot, mask=ids >= 0, other=0.0)
    return ids, at, tl.load(z_row + ids, mask=ids >= 0, other=0.0)


@triton.jit
def matched(ids, ids_ptr, at_ptr, K, row, otherwise):
    """`at` of the group whose ids stand at `ids_ptr`, where it has an id too; `otherwise` elsewhere."""
    for k in range(0, K):
        here = ids == tl.load(ids_ptr + row * K + k)
        otherwise = tl.where(here, tl.load(at_ptr + row * K + k), otherwise)
    return otherwise


@kernel
def gradient(
    z_ptr, z_stride, out_ptr, out_stride, bias_ptr, labels_ptr, at_label_ptr,
    ids0_ptr, at0_ptr, K0, ids1_ptr, at1_ptr, K1, ids2_ptr, at2_ptr, K2,
    rest_ptr, row_ptr, weights_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, lse_ptr, totals_ptr,
    rows, V, W,
    SOFTMAXES: tl.constexpr, GROUPS: tl.constexpr, DENSE: tl.constexpr, TEMPERATURES: tl.constexpr,
    HEAD: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of all terms, differentiated by the products. `out` may be `z` itself.

    SOFTMAXES: (1 / T, 1 if over all V ids else 0, group). A group is a support: its `ids` and `at` as `normalise` left
    them, padded to GROUPS[g] slots; group -1 has none. Everything is written as if outside every support, and then the
    label's id and the supports' over it, group by group: the last that has an id writes it, with what the groups
    before give to it.
    """
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z_row, out_row = z_ptr + row * z_stride, out_ptr + row * out_stride
    teacher_row = teacher_ptr + row * teacher_stride
    # All that is read of the row at single ids is read before the sweep writes over it.
    label = tl.load(labels_ptr + row)
    at_label = tl.load(at_label_ptr + row)
    label_1 = label + tl.zeros([1], tl.int64)
    raw_label = tl.load(z_row + label_1)
    if len(GROUPS) > 0:
        ids0, at0, raw0 = entries(z_row, ids0_ptr, at0_ptr, K0, row, GROUPS[0])
    if len(GROUPS) > 1:
        ids1, at1, raw1 = entries(z_row, ids1_ptr, at1_ptr, K1, row, GROUPS[1])
    if len(GROUPS) > 2:
        ids2, at2, raw2 = entries(z_row, ids2_ptr, at2_ptr, K2, row, GROUPS[2])
    tl.debug_barrier()

    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        raw = tl.load(z_row + columns, mask=columns < V, other=0.0)
        x = to_logits(raw, columns, columns < V, bias_ptr, HEAD)
        out = spread_of(x, columns, W, rest_ptr, row_ptr, rows, row, SOFTMAXES, ALL)
        if len(DENSE) > 0:
            out += compared(
                x, columns, columns < W, teacher_row, teacher_bias_ptr, weights_ptr,
                lse_ptr, totals_ptr, rows, row, DENSE, TEMPERATURES, TEACHER,
            )  # fmt: skip
        out *= chain(x, HEAD)
        tl.store(out_row + columns, out.to(out_ptr.dtype.element_ty), mask=columns < V)

    for g in tl.static_range(-1, len(GROUPS)):
        tl.debug_barrier()  # what is written now lies over what other threads have written
        if g == -1:
            ids, at, raw = label_1, tl.zeros([1], DTYPE), raw_label
        elif g == 0:
            ids, at, raw = ids0.to(tl.int64), at0, raw0
        elif g == 1:
            ids, at, raw = ids1.to(tl.int64), at1, raw1
        else:
            ids, at, raw = ids2.to(tl.int64), at2, raw2
        x = to_logits(raw, ids, ids >= 0, bias_ptr, HEAD)
        out = at + tl.where(ids == label, at_label, 0.0)
        out += spread_of(x, ids, W, rest_ptr, row_ptr, rows, row, SOFTMAXES, -1)
        if g != 0 and len(GROUPS) > 0:
            part = spread_of(x, ids, W, rest_ptr, row_ptr, rows, row, SOFTMAXES, 0)
            if g > 0:
                part = matched(ids, ids0_ptr, at0_ptr, K0, row, part)
            out += part
        if g != 1 and len(GROUPS) > 1:
            part = spread_of(x, ids, W, rest_ptr, row_ptr, rows, row, SOFTMAXES, 1)
            if g > 1:
                part = matched(ids, ids1_ptr, at1_ptr, K1, row, part)
            out += part
        if g != 2 and len(GROUPS) > 2:
            out += spread_of(x, ids, W, rest_ptr, row_ptr, rows, row, SOFTMAXES, 2)
        if len(DENSE) > 0:
            out += compared(
                x, ids, (ids >= 0) & (ids < W), teacher_row, teacher_bias_ptr,
                weights_ptr, lse_ptr, totals_ptr, rows, row, DENSE, TEMPERATURES, TEACHER,
            )  # fmt: skip
        out *= chain(x, HEAD)
        tl.store(out_row + ids, out.to(out_ptr.dtype.element_ty), mask=ids >= 0)
