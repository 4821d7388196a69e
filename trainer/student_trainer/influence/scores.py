"""From gradients and embeddings to a weight for each document: the arithmetic of influence. Called by `measure`.

    p_i = <g_i, sum over targets t of g_t>     influence of document i, all gradients of unit length: `alignments`
    p   = K_EL (K_LL + damping I)^-1 p_L       of a document that is no landmark, by its neighbours: `Propagation`
    w   = argmax p^T w - lambda/2 |w|^2        with w >= 0 and mean 1, lambda = sd(p) / strength: `sample_weights`

To first order a step along g_i lowers the loss on the targets by the rate times |g_i| times p_i; the second-order term
of the paper is left out, as in its authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FOLDS = 5
ROWS = 4096  # of a kernel at a time
DAMPING = 1e-2


def unit(rows_NR: Tensor) -> Tensor:
    """Rows of length 1; one of zeros stays."""
    return rows_NR / rows_NR.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows_NR.dtype).tiny)


def alignments(gradients_NR: Tensor, targets_MR: Tensor) -> Tensor:
    """[N] float64: by document, the sum of its cosines with all targets' gradients."""
    return unit(gradients_NR.double()) @ unit(targets_MR.double()).sum(0)


@dataclass(frozen=True)
class Propagation:
    """Kernel ridge regression of influence on embeddings, with an RBF kernel as wide as the median distance of two
    landmarks. Far from all landmarks it says their mean.
    """

    landmarks_LE: Tensor
    coefficients_L: Tensor
    mean: float
    width: float

    @classmethod
    def of(cls, embeddings_LE: Tensor, influence_L: Tensor, damping: float = DAMPING) -> Propagation:
        """Out of the landmarks' embeddings and influence."""
        landmarks_LE = embeddings_LE.double()
        distance_LL = torch.cdist(landmarks_LE, landmarks_LE)
        pairs = distance_LL[~torch.eye(len(landmarks_LE), dtype=torch.bool)]
        # Of the off-diagonal distances: the diagonal is 0 and would narrow the kernel.
        width = float(pairs.median()) if len(pairs) else 1.0
        mean = float(influence_L.double().mean())
        kernel_LL = _kernel(distance_LL, width)
        damped_LL = kernel_LL + damping * torch.eye(len(landmarks_LE), dtype=torch.float64)
        # (K + damping I)^-1 (p - mean): what is left over is added back, so far from all landmarks it is the mean.
        coefficients_L = torch.linalg.solve(damped_LL, influence_L.double() - mean)
        return cls(landmarks_LE, coefficients_L, mean, width)

    def __call__(self, embeddings_NE: Tensor) -> Tensor:
        """[N] float64: the influence that documents with these embeddings are thought to have."""
        parts = [
            _kernel(torch.cdist(part_NE.double(), self.landmarks_LE), self.width) @ self.coefficients_L
            for part_NE in embeddings_NE.split(ROWS)
        ]
        return torch.cat(parts) + self.mean if parts else torch.zeros(0, dtype=torch.float64)


def _kernel(distance: Tensor, width: float) -> Tensor:
    return torch.exp(-((distance / max(width, 1e-12)) ** 2) / 2)


def trust(embeddings_LE: Tensor, influence_L: Tensor) -> float:
    """How well neighbours tell influence: the rank correlation of what the others say of each fifth of the landmarks
    with what it is.
    """
    fold_L = torch.arange(len(influence_L)) % FOLDS
    said_L = torch.zeros(len(influence_L), dtype=torch.float64)
    for fold in range(FOLDS):
        of_fold = fold_L == fold
        if of_fold.any() and not of_fold.all():
            others = Propagation.of(embeddings_LE[~of_fold], influence_L[~of_fold])
            said_L[of_fold] = others(embeddings_LE[of_fold])
    return rank_correlation(said_L, influence_L)


def rank_correlation(a_N: Tensor, b_N: Tensor) -> float:
    """Spearman's, ties broken by place."""
    ranks_2N = torch.stack([a_N.argsort(stable=True).argsort(), b_N.argsort(stable=True).argsort()]).double()
    return float(torch.corrcoef(ranks_2N)[0, 1])


def sample_weights(influence_N: Tensor, strength: float) -> Tensor:
    """[N] float64, at least 0 and 1 on average: max(0, strength * p / sd(p) + c), with the one c that does it.

    strength 0: all 1. At 1 a document one standard deviation above another weighs 1 more, where neither is at 0.
    """
    deviation = influence_N.double().std(correction=0)
    if strength == 0 or not deviation > 0:
        return torch.ones(len(influence_N), dtype=torch.float64)
    pull_N = strength * influence_N.double() / deviation
    # Euclidean projection onto the simplex of sum N: c follows from how many stay above 0.
    ordered_N = pull_N.sort(descending=True).values
    count_N = torch.arange(1, len(ordered_N) + 1, dtype=torch.float64)
    # With the k largest above 0, sum of (pull + c) over them is N: c = (N - their sum) / k.
    c_N = (len(ordered_N) - ordered_N.cumsum(0)) / count_N
    # The largest k for which the k-th is still above 0.
    above = int((ordered_N + c_N > 0).nonzero().max())
    return (pull_N + c_N[above]).clamp_min(0)
