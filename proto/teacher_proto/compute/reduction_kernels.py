"""The Triton kernels of `reduction_triton`, which describes and launches them.

What is requested is a compile-time constant, so another K or another number of temperatures is compiled anew.
"""

# mypy: allow-untyped-defs
# Without deferred annotations: Triton reads them.
import math

import triton
import triton.language as tl

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def stream(
    logits, row_stride, vocab_size, coefficients, best_NS, sums_NSL,
    maxima_Nb, segments, blocks, LANES: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """The largest logit and the sums at every T of one segment of one row, and the maxima of its blocks."""
    # Neighbouring programs read neighbouring memory. int64, since a chunk may have more than 2**31 logits.
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    # log2(e) / T per lane: exp(x / T) is exp2(x * log2(e) / T), and exp2 is a GPU instruction.
    per_lane = tl.load(coefficients + lane)
    in_tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    best = tl.full([], float("-inf"), tl.float32)
    sums = tl.zeros([WIDTH], tl.float32)
    for tile in range(TILES):
        first = (segment * TILES + tile) * ROWS * COLUMNS
        column = first + in_tile
        z = tl.load(logits + row * row_stride + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        of_blocks = tl.max(z, axis=1)
        if MAXIMA:
            block = first // COLUMNS + tl.arange(0, ROWS)
            tl.store(maxima_Nb + row * blocks + block, of_blocks, mask=block < blocks)
        larger = tl.maximum(best, tl.max(of_blocks, axis=0))
        # While all logits are -inf, use a finite reference: -inf - -inf is NaN, but exp2(-inf - 0) is 0, as required.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        distance = z - reference
        # The terms at T = 1 are the squares of those at T = 2, as in `reduction`.
        terms = tl.exp2(distance * (_LOG2E / 2))
        # Sum first along axis 0, which is within one thread, then across threads.
        added = tl.where(lane == 0, tl.sum(tl.sum(terms * terms, axis=0), axis=0), 0.0)
        added = tl.where(lane == 1, tl.sum(tl.sum(terms, axis=0), axis=0), added)
        for other in tl.static_range(2, LANES):
            terms = tl.exp2(distance * tl.load(coefficients + other))
            added = tl.where(lane == other, tl.sum(tl.sum(terms, axis=0), axis=0), added)
        # Rescale: the sums so far are relative to the largest logit so far.
        sums = sums * tl.exp2((best - reference) * per_lane) + added
        best = larger
    tl.store(best_NS + row * segments + segment, best)
    tl.store(sums_NSL + (row * segments + segment) * WIDTH + lane, sums)


@triton.jit(do_not_specialize=["columns", "count"])
def combine(
    logits, row_stride, next_ids, best_NS, sums_NSL, maxima_Nb,
    coefficients, temperatures, places, best_N, log_sum_N, lse_N,
    next_logprob_N, log_z_NT, chosen_NC, segments, blocks, columns, count,
    SEGMENTS_UP: tl.constexpr, WIDTH: tl.constexpr, BLOCKS_UP: tl.constexpr, PIECE: tl.constexpr,
    NEXT: tl.constexpr, CHOOSE: tl.constexpr,
):  # fmt: skip
    """The results of one row from its segments', and its `count` blocks with the largest maxima, ascending by index."""
    row = tl.program_id(0).to(tl.int64)
    lane, segment = tl.arange(0, WIDTH), tl.arange(0, SEGMENTS_UP)
    there = segment < segments
    of_segments = tl.load(best_NS + row * segments + segment, mask=there, other=float("-inf"))
    sums = tl.load(
        sums_NSL + (row * segments + segment[:, None]) * WIDTH + lane[None, :], mask=there[:, None], other=0.0
    )
    best = tl.max(of_segments, axis=0)
    # A segment's sums are relative to its own largest logit m_s; times exp((m_s - m) / T) they are relative to the
    # row's m. A row in which all logits are -inf becomes NaN here, as in `reduction`.
    moved = tl.exp2((of_segments - best)[:, None] * tl.load(coefficients + lane)[None, :])
    total = tl.sum(sums * moved, axis=0)
    log_sums = tl.log(tl.where(total == 0.0, 1.0, total))  # only unused lanes have a total of 0
    # Lane 0 is T = 1: summing with zeros extracts one element of a vector.
    log_sum = tl.sum(tl.where(lane == 0, log_sums, 0.0), axis=0)
    place = tl.load(places + lane)
    temperature = tl.load(temperatures + lane)
    # log_z(T) = log S(T) - log S(1) / T. No division at T = 1, where it must be 0: a GPU's division is off by up to 2
    # units in the last place.
    log_z = log_sums - tl.where(temperature == 1.0, log_sum, log_sum / temperature)
    tl.store(log_z_NT + row * columns + place, log_z, mask=place >= 0)
    tl.store(best_N + row, best)
    tl.store(log_sum_N + row, log_sum)
    tl.store(lse_N + row, best + log_sum)
    if NEXT:
        at = tl.maximum(tl.load(next_ids + row), 0)
        # z - m - log S(1), in this order: a large lse would lose the difference to rounding.
        next_logit = tl.load(logits + row * row_stride + at).to(tl.float32)
        tl.store(next_logprob_N + row, next_logit - best - log_sum)
    if CHOOSE:
        # Choose the blocks whose maxima are above the count-th largest, and the first `left` of those equal to it.
        every = tl.arange(0, BLOCKS_UP)
        kth, left = _kth_largest(_keys_of(maxima_Nb + row * blocks + every, every < blocks), count)
        kept_before, equal_before = 0, 0
        # Read again, in pieces, so that registers hold no other vector of a row besides its keys.
        for start in range(0, BLOCKS_UP, PIECE):
            block = start + tl.arange(0, PIECE)
            keys = _keys_of(maxima_Nb + row * blocks + block, block < blocks)
            kept, slot, kept_before, equal_before = _slots(keys, kth, left, kept_before, equal_before)
            tl.store(chosen_NC + row * count + slot, block, mask=kept)


@triton.jit(do_not_specialize=["count", "k"])
def pick(
    logits, row_stride, vocab_size, chosen_NC, values_NK, ids_NK, count, k,
    COLUMNS: tl.constexpr, CANDIDATES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The k largest logits of one row's chosen blocks, with their ids, ascending by id."""
    row = tl.program_id(0).to(tl.int64)
    first_logit, first_block = logits + row * row_stride, chosen_NC + row * count
    every, there = _candidates(first_block, tl.arange(0, CANDIDATES), count, vocab_size, COLUMNS)
    # First the k-th largest of all candidates; then, in pieces, those above it and the first `left` of equal ones.
    kth, left = _kth_largest(_keys_of(first_logit + every, there), k)
    kept_before, equal_before = 0, 0
    for start in range(0, CANDIDATES, PIECE):
        column, within = _candidates(first_block, start + tl.arange(0, PIECE), count, vocab_size, COLUMNS)
        keys = _keys_of(first_logit + column, within)
        kept, slot, kept_before, equal_before = _slots(keys, kth, left, kept_before, equal_before)
        tl.store(values_NK + row * k + slot, tl.load(first_logit + column, mask=kept, other=0.0), mask=kept)
        tl.store(ids_NK + row * k + slot, column, mask=kept)


@triton.jit
def _candidates(first_block, candidate, count, vocab_size, COLUMNS: tl.constexpr):
    """The columns of the candidates in a row's chosen blocks, and a mask of those that exist."""
    within = candidate < count * COLUMNS
    column = tl.load(first_block + candidate // COLUMNS, mask=within, other=0) * COLUMNS + candidate % COLUMNS
    return column, within & (column < vocab_size)


@triton.jit(do_not_specialize=["k"])
def place(
    values_NK, ids_NK, best_N, log_sum_N, placed_NK, logprobs_NK, k,
    RANKS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sort a row's k largest logits and convert them to fp16 logprobs. The rank of each is the number of those before
    it: larger ones, and equal ones of lower id, which come earlier in the input.
    """
    row = tl.program_id(0).to(tl.int64)
    mine = tl.arange(0, RANKS)
    values = tl.load(values_NK + row * k + mine, mask=mine < k, other=0.0)
    keys = _ordered(values)
    rank = tl.zeros([RANKS], tl.int32)
    for start in range(0, k, STEP):
        other = start + tl.arange(0, STEP)
        there = other < k
        others = tl.where(there, _ordered(tl.load(values_NK + row * k + other, mask=there, other=0.0)), 0)
        before = (others[None, :] > keys[:, None]) | (
            (others[None, :] == keys[:, None]) & (other[None, :] < mine[:, None])
        )
        rank += tl.sum(before.to(tl.int32), axis=1)
    logprob = values - tl.load(best_N + row) - tl.load(log_sum_N + row)
    # From the distance, since a large lse would lose the difference to rounding. Clamped to fp16's range; NaN stays, as
    # its comparisons are false.
    logprob = tl.where(logprob > 0.0, 0.0, tl.where(logprob < -65504.0, -65504.0, logprob))
    tl.store(placed_NK + row * k + rank, tl.load(ids_NK + row * k + mine, mask=mine < k, other=0), mask=mine < k)
    tl.store(logprobs_NK + row * k + rank, logprob.to(tl.float16), mask=mine < k)


@triton.jit
def _ordered(z):
    """uint32 keys with the order of fp32 numbers: the sign bit is flipped, for negative numbers all bits. NaN counts as
    +inf, -0 as 0; no number has the key 0.
    """
    z = tl.where(z == z, z, float("inf"))
    bits = tl.where(z == 0.0, 0.0, z).to(tl.uint32, bitcast=True)
    return tl.where(bits < 0x80000000, bits | 0x80000000, ~bits)


@triton.jit
def _keys_of(at, within):
    """Keys of the numbers at these addresses; 0, which is below the key of any number, where masked."""
    return tl.where(within, _ordered(tl.load(at, mask=within, other=0.0).to(tl.float32)), 0)


@triton.jit
def _kth_largest(keys, k):
    """A vector's k-th largest key, and how many keys equal to it are among the k largest.

    The key is built from its highest bit down: a bit is set if at least k keys are >= the key with that bit.
    """
    kth = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        kth = tl.where(tl.sum((keys >= (kth | bit)).to(tl.int32), axis=0) >= k, kth | bit, kth)
        bit = bit >> 1
    return kth, k - tl.sum((keys > kth).to(tl.int32), axis=0)


@triton.jit
def _slots(keys, kth, left, kept_before, equal_before):
    """A mask of the keys that are among the k largest (of those equal to the k-th, the first `left`), the slot of each
    in the output, and the two running counts, updated.
    """
    equal = (keys == kth).to(tl.int32)
    kept = (keys > kth) | ((equal == 1) & (equal_before + tl.cumsum(equal, axis=0) <= left))
    counted = kept.to(tl.int32)
    slot = kept_before + tl.cumsum(counted, axis=0) - 1
    return kept, slot, kept_before + tl.sum(counted, axis=0), equal_before + tl.sum(equal, axis=0)
