"""The arithmetic of influence, from gradients and embeddings to a weight for each document. Called by `measure`.

    p_i = <g_i, sum over targets t of g_t>     influence of document i, all gradients of unit length: `alignments`
    p   = K_EL (K_LL + damping I)^-1 p_L       estimate for a document that is no landmark: `Propagation`
    w   = argmax p^T w - lambda/2 |w|^2        with w >= 0 and mean 1, lambda = sd(p) / strength: `sample_weights`

To first order, a step along g_i lowers the targets' loss by the learning rate times |g_i| times p_i. The paper's
second-order term is left out, as in its authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FOLDS = 5
ROWS = 4096  # rows of a kernel matrix computed at a time
DAMPING = 1e-2


def unit(rows_NR: Tensor) -> Tensor:
    """Rows scaled to length 1; rows of zeros stay zero."""
    return rows_NR / rows_NR.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows_NR.dtype).tiny)


def alignments(gradients_NR: Tensor, targets_MR: Tensor) -> Tensor:
    """[N] float64: for each document, the sum of its gradient's cosines with all targets' gradients."""
    return unit(gradients_NR.double()) @ unit(targets_MR.double()).sum(0)


@dataclass(frozen=True)
class Propagation:
    """Kernel ridge regression of influence on embeddings, with an RBF kernel whose width is the median distance between
    two landmarks. Far from all landmarks it predicts their mean.
    """

    landmarks_LE: Tensor
    coefficients_L: Tensor
    mean: float
    width: float

    @classmethod
    def of(cls, embeddings_LE: Tensor, influence_L: Tensor, damping: float = DAMPING) -> Propagation:
        """Fit the regression to the landmarks' embeddings and influence."""
        landmarks_LE = embeddings_LE.double()
        distance_LL = torch.cdist(landmarks_LE, landmarks_LE)
        pairs = distance_LL[~torch.eye(len(landmarks_LE), dtype=torch.bool)]
        # Only off-diagonal distances: the diagonal is 0 and would narrow the kernel.
        width = float(pairs.median()) if len(pairs) else 1.0
        mean = float(influence_L.double().mean())
        kernel_LL = _kernel(distance_LL, width)
        damped_LL = kernel_LL + damping * torch.eye(len(landmarks_LE), dtype=torch.float64)
        # (K + damping I)^-1 (p - mean): the mean is added back to predictions, which tend to it far from landmarks.
        coefficients_L = torch.linalg.solve(damped_LL, influence_L.double() - mean)
        return cls(landmarks_LE, coefficients_L, mean, width)

    def __call__(self, embeddings_NE: Tensor) -> Tensor:
        """[N] float64: the estimated influence of documents with these embeddings."""
        parts = [
            _kernel(torch.cdist(part_NE.double(), self.landmarks_LE), self.width) @ self.coefficients_L
            for part_NE in embeddings_NE.split(ROWS)
        ]
        return torch.cat(parts) + self.mean if parts else torch.zeros(0, dtype=torch.float64)


def _kernel(distance: Tensor, width: float) -> Tensor:
    return torch.exp(-((distance / max(width, 1e-12)) ** 2) / 2)


def trust(embeddings_LE: Tensor, influence_L: Tensor) -> float:
    """How well embeddings predict influence: the rank correlation between the landmarks' influence and its estimates
    by cross-validation, in which each fifth of the landmarks is predicted from the others.
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
    """Spearman's rank correlation, with ties broken by position."""
    ranks_2N = torch.stack([a_N.argsort(stable=True).argsort(), b_N.argsort(stable=True).argsort()]).double()
    return float(torch.corrcoef(ranks_2N)[0, 1])


def sample_weights(influence_N: Tensor, strength: float) -> Tensor:
    """[N] float64, at least 0 and with mean 1: max(0, strength * p / sd(p) + c), where c makes the mean 1.

    With strength 0 all are 1. With strength 1 a document one standard deviation above another weighs 1 more, unless
    one of them is clipped to 0.
    """
    deviation = influence_N.double().std(correction=0)
    if strength == 0 or not deviation > 0:
        return torch.ones(len(influence_N), dtype=torch.float64)
    pull_N = strength * influence_N.double() / deviation
    # Euclidean projection onto the simplex of sum N: c depends on how many weights stay above 0.
    ordered_N = pull_N.sort(descending=True).values
    count_N = torch.arange(1, len(ordered_N) + 1, dtype=torch.float64)
    # If the k largest are above 0, (pull + c) sums to N over them, so c = (N - their sum) / k.
    c_N = (len(ordered_N) - ordered_N.cumsum(0)) / count_N
    # The largest k for which the k-th weight is above 0.
    above = int((ordered_N + c_N > 0).nonzero().max())
    return (pull_N + c_N[above]).clamp_min(0)
