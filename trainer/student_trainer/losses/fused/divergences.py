"""The divergences of `losses.divergences` as Triton functions of one bucket. Called by `normalise` and `compare`.

Each returns (value, slope) as defined there, before the sum over buckets. A test compares the two lists of kinds, and
the numbers of every kind.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The kinds that have a kernel, with the number that the kernels use for each, since Triton before 3.9 takes no strings
# in a tuple; a call with any other kind uses torch operations.
KINDS = {
    "top_k_kl": 0, "forward_kl": 0, "tcs": 0, "reverse_kl": 1, "jsd": 2, "skewed_kl": 3, "skewed_reverse_kl": 4,
    "tvd": 5, "sampled": 6,
}  # fmt: skip
FORWARD_KL, REVERSE_KL, JSD, SKEWED_KL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SKEWED_REVERSE_KL, TVD, SAMPLED = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
LABEL_KINDS = ("cross_entropy",)


@triton.jit
def log_add_exp(a, b):
    """log(exp a + exp b)."""
    top = tl.maximum(a, b)
    x = tl.exp(tl.minimum(a, b) - top)
    # log(1 + x), accurate for small x: the factor makes up for what rounding 1 + x has lost.
    y = 1.0 + x
    return top + tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def divergence(log_p, log_q, KIND: tl.constexpr, LOG_A: tl.constexpr, LOG_1_A: tl.constexpr, A: tl.constexpr):
    """(value, slope) bucket by bucket, with p the teacher. `A`: jsd's beta or a skewed divergence's alpha, with log A
    and log(1 - A).
    """
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == FORWARD_KL:
        value = p * (log_p - log_q)
        slope = -p
    elif KIND == REVERSE_KL:
        value = q * (log_q - log_p)
        slope = value  # less a multiple of q, see `losses.divergences`
    elif KIND == JSD:
        # m = A p + (1 - A) q
        log_m = log_add_exp(log_p + LOG_A, log_q + LOG_1_A)
        slope = (1.0 - A) * q * (log_q - log_m)
        value = A * p * (log_p - log_m) + slope
    elif KIND == SKEWED_KL:
        log_m = log_add_exp(log_p + LOG_A, log_q + LOG_1_A)
        value = p * (log_p - log_m)
        # -p d log m / d log q = -(1 - A) p q / m
        slope = -(1.0 - A) * tl.exp(log_p + log_q - log_m)
    elif KIND == SKEWED_REVERSE_KL:
        # m = A q + (1 - A) p; exp(gap) = q / m
        gap = log_q - log_add_exp(log_q + LOG_A, log_p + LOG_1_A)
        value = q * gap
        slope = q * (gap + 1.0 - A * tl.exp(gap))
    elif KIND == TVD:
        value = 0.5 * tl.abs(q - p)
        # d |q - p| / d log q = q sign(q - p)
        slope = 0.5 * q * tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
    else:
        tl.static_assert(KIND == SAMPLED, "a kind without a kernel")
        value = -p * log_q
        slope = -p
    return value, slope
