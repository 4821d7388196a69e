"""The gradient of all terms together with respect to the head's products, in one sweep over a row in Triton.

Launched by `launch`, one program per row, after `normalise` and `compare`. `passes` is the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from student_trainer.losses.fused.compare import compared
from student_trainer.losses.fused.row_functions import kernel, to_logits

ALL = tl.constexpr(-2)  # stands for all groups
NONE = tl.constexpr(-1)  # the group of the softmaxes without a support


@triton.jit
def spread_of(x, columns, W, rest_ptr, row_ptr, rows, row, SOFTMAXES: tl.constexpr, GROUP: tl.constexpr):
    """The gradient with respect to logits x, outside the support, from a group's softmaxes (ALL: from every group's):
    the row's number of each softmax, times the id's share exp(x / T - rest) of everything outside.
    """
    out = tl.zeros_like(x)
    for s in tl.static_range(len(SOFTMAXES)):
        if GROUP == ALL or SOFTMAXES[s][2] == GROUP:
            rest = tl.load(rest_ptr + s * rows + row)
            per_row = tl.load(row_ptr + s * rows + row)
            # The exponent is above 0 only at ids of the support, whose gradient is written later: avoid an infinity.
            part = per_row * tl.exp(tl.minimum(x * SOFTMAXES[s][0] - rest, 0.0))
            if SOFTMAXES[s][1] == 0:
                # A softmax over the shared ids does not have the others.
                part = tl.where(columns < W, part, 0.0)
            out += part
    return out


@triton.jit
def chain(x, HEAD: tl.constexpr):
    """d logit / d product, at logit x: the scale, and with z = C tanh(y / C) also dz / dy = 1 - (z / C)^2."""
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
    return ids.to(tl.int64), at, tl.load(z_row + ids, mask=ids >= 0, other=0.0)


@triton.jit
def matched(ids, ids_ptr, at_ptr, K, row, otherwise):
    """`at` of the group whose ids are at `ids_ptr`, where it has an id too; `otherwise` elsewhere."""
    for k in range(0, K):
        here = ids == tl.load(ids_ptr + row * K + k)
        otherwise = tl.where(here, tl.load(at_ptr + row * K + k), otherwise)
    return otherwise


@triton.jit
def from_group(
    x, ids, W, rest_ptr, row_ptr, ids_ptr, at_ptr, K, rows, row, SOFTMAXES: tl.constexpr, GROUP: tl.constexpr,
    WRITTEN: tl.constexpr,
):  # fmt: skip
    """Another group's part of the gradient at `ids`: its `at` where it has the id too, else its spread part. A group
    that is yet to be written (WRITTEN is false) later overwrites its own ids in any case.
    """
    part = spread_of(x, ids, W, rest_ptr, row_ptr, rows, row, SOFTMAXES, GROUP)
    if WRITTEN:
        part = matched(ids, ids_ptr, at_ptr, K, row, part)
    return part


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
    """The derivative of the sum of all terms with respect to the products. `out` may be `z` itself.

    SOFTMAXES: (1 / T, 1 if over all V ids else 0, group). A group is a support: its `ids` and `at` as `normalise` left
    them, padded to GROUPS[g] slots; group -1 has none. Everything is first written as if outside every support, and
    then overwritten at the label and at the supports' ids, group by group: the last group that has an id writes it,
    including the parts of the groups before.
    """
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z_row, out_row = z_ptr + row * z_stride, out_ptr + row * out_stride
    teacher_row = teacher_ptr + row * teacher_stride
    # Everything needed of the row at single ids is read before the sweep overwrites it.
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
        # Each entry of `z` is read by the thread that then writes it, so `out` may be `z`.
        tl.store(out_row + columns, out.to(out_ptr.dtype.element_ty), mask=columns < V)

    for g in tl.static_range(-1, len(GROUPS)):
        tl.debug_barrier()  # what is written now overwrites what other threads have written
        if g == -1:
            ids, at, raw = label_1, tl.zeros([1], DTYPE), raw_label
        elif g == 0:
            ids, at, raw = ids0, at0, raw0
        elif g == 1:
            ids, at, raw = ids1, at1, raw1
        else:
            ids, at, raw = ids2, at2, raw2
        x = to_logits(raw, ids, ids >= 0, bias_ptr, HEAD)
        # The group's own gradient at its ids, the label's if it is one of them, and the parts of all other groups.
        out = at + tl.where(ids == label, at_label, 0.0)
        out += spread_of(x, ids, W, rest_ptr, row_ptr, rows, row, SOFTMAXES, NONE)
        if g != 0 and len(GROUPS) > 0:
            out += from_group(x, ids, W, rest_ptr, row_ptr, ids0_ptr, at0_ptr, K0, rows, row, SOFTMAXES, 0, g > 0)
        if g != 1 and len(GROUPS) > 1:
            out += from_group(x, ids, W, rest_ptr, row_ptr, ids1_ptr, at1_ptr, K1, rows, row, SOFTMAXES, 1, g > 1)
        if g != 2 and len(GROUPS) > 2:
            out += from_group(x, ids, W, rest_ptr, row_ptr, ids2_ptr, at2_ptr, K2, rows, row, SOFTMAXES, 2, False)
        if len(DENSE) > 0:
            out += compared(
                x, ids, (ids >= 0) & (ids < W), teacher_row, teacher_bias_ptr,
                weights_ptr, lse_ptr, totals_ptr, rows, row, DENSE, TEMPERATURES, TEACHER,
            )  # fmt: skip
        out *= chain(x, HEAD)
        tl.store(out_row + ids, out.to(out_ptr.dtype.element_ty), mask=ids >= 0)
