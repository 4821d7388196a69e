"""The arithmetic of the policies: new weights from old ones and metrics, by source, in double precision.

Sources are kept in the order of the weights, so that sums are the same on every rank and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from student_trainer.data.policies.policy import Weights

TINY = 1e-300


def normed(weights: Weights) -> dict[str, float]:
    """Weights scaled to sum to 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def floored(weights: Weights, least: float) -> dict[str, float]:
    """Weights raised to at least `least` and normalised again, which may bring them slightly below it."""
    return normed({name: max(weight, least) for name, weight in weights.items()})


def tilted(weights: Weights, exponents: Mapping[str, float]) -> dict[str, float]:
    """norm(w exp(x)), without overflow for any exponent."""
    largest = max(exponents[name] for name in weights)
    return normed({name: weight * math.exp(exponents[name] - largest) for name, weight in weights.items()})


def perplexity_ratios(gaps: Mapping[str, float]) -> dict[str, float]:
    """exp(gap): the student's perplexity divided by the teacher's if the gap is between their cross-entropies."""
    return {name: math.exp(min(gap, 700.0)) for name, gap in gaps.items()}


def bounded_step(weights: Weights, gaps: Mapping[str, float], kept: float) -> dict[str, float]:
    """DDK (arXiv 2407.16154): a norm(w exp(ratio)) + (1 - a) / N with a = `kept`, so at least (1 - a) / N each."""
    tilt, share = tilted(weights, perplexity_ratios(gaps)), (1.0 - kept) / len(weights)
    return {name: kept * weight + share for name, weight in tilt.items()}


def exponentiated_step(weights: Weights, gaps: Mapping[str, float], eta: float, smoothing: float) -> dict[str, float]:
    """DoReMi (arXiv 2305.10429): (1 - c) norm(w exp(eta gap)) + c / N, with each source's mean gap clipped at 0.

    The mean is clipped and not each token: clipping per token would turn noise with mean 0 into a gap.
    """
    tilt = tilted(weights, {name: eta * max(gaps[name], 0.0) for name in weights})
    return {name: (1.0 - smoothing) * weight + smoothing / len(weights) for name, weight in tilt.items()}


def averaged_step(weights: Weights, scores: Mapping[str, float], eta: float, kept: float) -> dict[str, float]:
    """kept w + (1 - kept) norm(w exp(eta score)). With `doge_scores` and kept = 0 this is DoGE's step, with dot
    products as scores DGA's (arXiv 2410.02498).
    """
    tilt = tilted(weights, {name: eta * scores[name] for name in weights})
    return {name: kept * weight + (1.0 - kept) * tilt[name] for name, weight in weights.items()}


def doge_scores(dots: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    """DoGE (arXiv 2310.15393): <g_i, g_probe> divided by the mean norm of the g_i, clipped to [0, 5]."""
    mean = sum(norms[name] for name in dots) / len(dots)
    return {name: min(max(dot / max(mean, TINY), 0.0), 5.0) for name, dot in dots.items()}


def within(weights: Weights, low: Weights, high: Weights) -> dict[str, float]:
    """clip(t w, low, high) with the t for which it sums to 1: in proportion to `weights` except where a bound holds.
    There is such a t if sum(low) <= 1 <= sum(high).
    """
    free = {name: max(weight, TINY) for name, weight in normed(weights).items()}
    held: dict[str, float] = {}
    while free:
        scale = (1.0 - sum(held.values())) / sum(free.values())
        above = {name: high[name] for name, weight in free.items() if scale * weight > high[name]}
        below = {name: low[name] for name, weight in free.items() if scale * weight < low[name]}
        if not above and not below:
            break
        # The side whose bounds shift more weight is certain to hold in the end; the other side's may become inactive.
        given = sum(scale * free[name] - bound for name, bound in above.items())
        taken = sum(bound - scale * free[name] for name, bound in below.items())
        fixed = above if given >= taken else below
        held |= fixed
        free = {name: weight for name, weight in free.items() if name not in fixed}
    return {name: held[name] if name in held else scale * free[name] for name in weights}
