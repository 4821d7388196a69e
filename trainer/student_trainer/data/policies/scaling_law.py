"""L(n) = e^e + e^a n^-alpha, fitted to a source's losses: Huber's loss of the logarithm, by L-BFGS from the best points
of a grid, as ADO has it (arXiv 2410.11820). Used by `ado`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HUBER = 1e-3
LARGEST_ALPHA, LARGEST_A, LEAST_E = 0.8, 6.5, 0.5
GRID = (torch.arange(-2.0, 6.5, 1.0), torch.arange(-2.0, 2.0, 0.5), torch.arange(0.0, 0.85, 0.1))
STARTS = 3  # points of the grid from which a fit is tried


@dataclass(frozen=True)
class ScalingLaw:
    """Its loss after n tokens, of which `exp(e)` stays however many they are."""

    a: float
    e: float
    alpha: float

    def reducible(self, n: float) -> float:
        """What training on more can still take off after n tokens."""
        # loss(n) = exp(e) + exp(a) n^-alpha, of which the second part is what n can still take off.
        return math.exp(self.a - self.alpha * math.log(n))

    def slope(self, n: float, least_alpha: float = 0.05) -> float:
        """How fast the loss falls with n, the exponent taken for no less than `least_alpha`."""
        # -d loss / d n = alpha exp(a) n^(-alpha - 1).
        return max(self.alpha, least_alpha) * self.reducible(n) / n


def fit(tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """The law nearest to these losses after so many tokens. `e` is at least 0.5, the published bound, or the logarithm
    of half the least loss where that is less: small losses would not fit under it.
    """
    log_n_T = torch.tensor(tokens, dtype=torch.float64).log()
    log_loss_T = torch.tensor(losses, dtype=torch.float64).log()
    least_e = min(LEAST_E, float(log_loss_T.min()) - math.log(2.0))
    grid_G3 = torch.cartesian_prod(*GRID).double()
    with torch.no_grad():
        # The misfit has many local minima: descent begins at the best points of a grid.
        starts = grid_G3[_misfit(grid_G3, log_n_T, log_loss_T, least_e).argsort(stable=True)[:STARTS]]
    fitted = min((_descend(start_3, log_n_T, log_loss_T, least_e) for start_3 in starts), key=lambda pair: pair[0])
    # Descent is only pushed towards the bounds; here they hold.
    a, e, alpha = fitted[1]
    return ScalingLaw(min(a, LARGEST_A), max(e, least_e), min(max(alpha, 0.0), LARGEST_ALPHA))


def _descend(start_3: Tensor, log_n_T: Tensor, log_loss_T: Tensor, least_e: float) -> tuple[float, list[float]]:
    law_3 = start_3.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([law_3], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def misfit() -> Tensor:
        optimizer.zero_grad()
        value = _misfit(law_3[None], log_n_T, log_loss_T, least_e)[0]
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(misfit)
    with torch.no_grad():
        value = float(_misfit(law_3[None], log_n_T, log_loss_T, least_e)[0])
    return (value if math.isfinite(value) else math.inf), law_3.detach().tolist()


def _misfit(law_G3: Tensor, log_n_T: Tensor, log_loss_T: Tensor, least_e: float) -> Tensor:
    """[G]: the sum of Huber's losses, and how far the laws are outside of their bounds."""
    a_G1, e_G1, alpha_G1 = law_G3[:, :1], law_G3[:, 1:2], law_G3[:, 2:]
    # In logarithms, so that early and late losses count alike.
    log_fit_GT = torch.logaddexp(a_G1 - alpha_G1 * log_n_T, e_G1.expand(-1, len(log_n_T)))
    huber_GT = torch.nn.functional.huber_loss(
        log_fit_GT, log_loss_T.expand_as(log_fit_GT), reduction="none", delta=HUBER
    )
    outside_G1 = (
        (alpha_G1 - LARGEST_ALPHA).relu()
        + (0.001 - alpha_G1).relu()
        + (a_G1 - LARGEST_A).relu()
        + (least_e - e_G1).relu()
    )
    return huber_GT.sum(1) + outside_G1[:, 0]
