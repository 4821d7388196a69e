"""`ado`: more weight for sources whose loss still falls fast, by a scaling law fitted to it (ADO, arXiv 2410.11820).

The loss is the student's cross-entropy with the data's own tokens; no teacher is needed. n counts the tokens of all
sources, and a source's credit is the square root of its share of recently drawn tokens.

The law is L(n) = e^e + e^a n^-alpha, fitted to a source's losses with a Huber loss of the log loss, by L-BFGS from the
best points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from student_trainer.data.policies.adaptive import Adaptive
from student_trainer.data.policies.policy import Weights
from student_trainer.data.policies.source_means import SourceMeans, of_sources
from student_trainer.data.policies.updates import floored, normed
from student_trainer.settings.mixture import AdoMixture

HUBER = 1e-3
LEAST_ALPHA, LARGEST_ALPHA, LARGEST_A, LEAST_E = 0.05, 0.8, 6.5, 0.5
GRID = (torch.arange(-2.0, 6.5, 1.0), torch.arange(-2.0, 2.0, 0.5), torch.arange(0.0, 0.85, 0.1))
STARTS = 3  # grid points to start a fit from


@dataclass(frozen=True)
class ScalingLaw:
    """A source's loss after n tokens; `exp(e)` is the irreducible part."""

    a: float
    e: float
    alpha: float

    def reducible(self, n: float) -> float:
        """The reducible part of the loss after n tokens."""
        # loss(n) = exp(e) + exp(a) n^-alpha; the second summand is reducible.
        return math.exp(self.a - self.alpha * math.log(n))

    def slope(self, n: float) -> float:
        """How fast the loss falls with n, with the exponent clipped to at least LEAST_ALPHA."""
        # -d loss / d n = alpha exp(a) n^(-alpha - 1).
        return max(self.alpha, LEAST_ALPHA) * self.reducible(n) / n


def fit(tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """The law that fits these losses after these numbers of tokens best. `e` is at least 0.5, the published bound, or
    the logarithm of half the smallest loss if that is less, since the bound is too high for small losses.
    """
    log_n_T = torch.tensor(tokens, dtype=torch.float64).log()
    log_loss_T = torch.tensor(losses, dtype=torch.float64).log()
    least_e = min(LEAST_E, float(log_loss_T.min()) - math.log(2.0))
    grid_G3 = torch.cartesian_prod(*GRID).double()
    with torch.no_grad():
        # The misfit has many local minima, so descent starts from the best points of a grid.
        starts = grid_G3[_misfit(grid_G3, log_n_T, log_loss_T, least_e).argsort(stable=True)[:STARTS]]
    fitted = min((_descend(start_3, log_n_T, log_loss_T, least_e) for start_3 in starts), key=lambda pair: pair[0])
    # A penalty only pushes descent towards the bounds; here they are enforced.
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
    """[G]: the sum of Huber losses, plus how far each law is out of bounds."""
    a_G1, e_G1, alpha_G1 = law_G3[:, :1], law_G3[:, 1:2], law_G3[:, 2:]
    # In log space, so that early and late losses count alike.
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


LOSS = "student_cross_entropy"
POINTS = 256  # maximum for a source's curve; beyond it, neighbours are merged
FEWEST = 8  # minimum of points to fit a law to
A_DECISION = 50  # points between two decisions, if there are as many updates
HISTORY = 0.9  # decay per update of the running mean of the shares drawn
Points = tuple[tuple[float, float], ...]  # (tokens of all sources until then, mean loss)


@dataclass(frozen=True)
class Ado(Adaptive):
    settings: AdoMixture
    watches: tuple[str, ...] = (LOSS,)
    means: SourceMeans = field(default_factory=SourceMeans)  # since the last point
    curves: Mapping[str, Points] = field(default_factory=dict)
    tokens: float = 0.0
    drawn: Mapping[str, float] = field(default_factory=dict)  # running mean of the shares drawn
    average: Mapping[str, float] = field(default_factory=dict)  # running mean of the preferences, from the prior on
    decisions: int = 0

    def observe(self, step: int, metrics: Mapping[str, float]) -> Self:
        counts = {name: metrics.get(f"source/{name}/tokens", 0.0) for name in self.prior}
        whole = sum(counts.values())
        if not whole:
            return self
        drawn = self.drawn or self.prior
        after = replace(
            self,
            means=self.means.add(of_sources(metrics, LOSS, self.prior), metrics),
            tokens=self.tokens + whole,
            # Exponential mean of the shares drawn, starting from the prior.
            drawn={n: HISTORY * drawn[n] + (1 - HISTORY) * counts[n] / whole for n in self.prior},
        )
        if (step + 1) % max(1, self.settings.update_interval // A_DECISION) == 0 or self.due(step):
            after = after._with_points()
        return after._decided(step) if self.due(step) else after

    def _with_points(self) -> Self:
        """Add the mean loss since the last point to each source's curve, as one more point."""
        curves = dict(self.curves)
        for name, (total, count) in self.means.sums.items():
            curves[name] = thinned((*curves.get(name, ()), (self.tokens, total / count)))
        return replace(self, curves=curves, means=SourceMeans())

    def _decided(self, step: int) -> Self:
        laws = {name: fit_curve(self.curves.get(name, ())) for name in self.prior}
        slopes = {name: law.slope(self.tokens) for name, law in laws.items() if law is not None}
        if not slopes:
            return self
        mean = sum(slopes.values()) / len(slopes)  # for sources of which too little was drawn
        average = self.average or self.prior
        says = preferences(self.prior, {n: slopes.get(n, mean) for n in self.prior}, self.drawn)
        # Mostly the mean of all preferences so far: a single fit is noisy.
        wanted = {name: 0.9 * average[name] + 0.1 * says[name] for name in self.prior}
        # A running mean over the prior and all decisions so far.
        part = 1.0 / (self.decisions + 2)  # the prior counts as one
        average = {name: (1.0 - part) * average[name] + part * says[name] for name in self.prior}
        reasons = {
            name: {"slope": slopes[name], "exponent": law.alpha, "reducible": law.reducible(self.tokens)}
            for name, law in laws.items()
            if law is not None
        }
        after = replace(self, average=average, decisions=self.decisions + 1)
        return after.decide(step, wanted, reasons)

    def state(self) -> dict[str, Any]:
        return {
            **super().state(), "means": self.means.state(), "tokens": self.tokens, "drawn": dict(self.drawn),
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
            "average": dict(self.average), "decisions": self.decisions,
        }  # fmt: skip

    def restored(self, state: Mapping[str, Any]) -> Self:
        curves = {name: tuple((n, loss) for n, loss in points) for name, points in state["curves"].items()}
        return replace(
            super().restored(state), means=SourceMeans.restored(state["means"]), curves=curves, tokens=state["tokens"],
            drawn=state["drawn"], average=state["average"], decisions=state["decisions"],
        )  # fmt: skip


def preferences(prior: Weights, slopes: Mapping[str, float], drawn: Weights) -> dict[str, float]:
    """rho = norm(prior * slope * sqrt(share drawn)), each raised to at least 0.01 and then normalised again."""
    return floored(normed({name: prior[name] * slopes[name] * drawn[name] ** 0.5 for name in prior}), 0.01)


def thinned(points: Points) -> Points:
    """Unchanged up to POINTS; beyond that, every two neighbours are merged into one."""
    if len(points) <= POINTS:
        return points
    pairs = [points[i : i + 2] for i in range(0, len(points), 2)]
    return tuple((pair[-1][0], sum(loss for _, loss in pair) / len(pair)) for pair in pairs)


def fit_curve(points: Sequence[tuple[float, float]]) -> ScalingLaw | None:
    """Fit a source's law without the first tenth of its points, where the learning rate warms up. None if there are
    too few points.
    """
    kept = [(n, loss) for n, loss in points[len(points) // 10 :] if loss > 0]
    return fit([n for n, _ in kept], [loss for _, loss in kept]) if len(kept) >= FEWEST else None
