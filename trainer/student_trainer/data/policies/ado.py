"""`ado`: more of a source whose loss still falls fast, by a scaling law fitted to it (ADO, arXiv 2410.11820).

The loss is the student's cross-entropy with the data's own tokens; no teacher is needed. n counts the tokens of all
sources, and a source's credit is the root of its share of what was lately drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from student_trainer.data.policies.adaptive import Adaptive
from student_trainer.data.policies.figures import SourceMeans, of_sources
from student_trainer.data.policies.policy import Weights
from student_trainer.data.policies.scaling_law import ScalingLaw, fit
from student_trainer.data.policies.updates import floored, normed
from student_trainer.settings.mixture import AdoMixture

LOSS = "student_cross_entropy"
POINTS = 256  # of a source's curve; where there are more, neighbours are put together
FEWEST = 8  # points that a law is fitted to
A_DECISION = 50  # points from one decision to the next, where there are as many updates
HISTORY = 0.9  # what stays, at an update, of the shares lately drawn
Points = tuple[tuple[float, float], ...]  # (tokens of all sources until then, mean loss)


@dataclass(frozen=True)
class Ado(Adaptive):
    settings: AdoMixture
    watches: tuple[str, ...] = (LOSS,)
    means: SourceMeans = field(default_factory=SourceMeans)  # since the last point
    curves: Mapping[str, Points] = field(default_factory=dict)
    tokens: float = 0.0
    drawn: Mapping[str, float] = field(default_factory=dict)  # running mean of the shares drawn
    average: Mapping[str, float] = field(default_factory=dict)  # of what the laws said, the prior to begin with
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
            # Exponential mean of the shares drawn, which the prior begins.
            drawn={n: HISTORY * drawn[n] + (1 - HISTORY) * counts[n] / whole for n in self.prior},
        )
        if (step + 1) % max(1, self.settings.update_interval // A_DECISION) == 0 or self.due(step):
            after = after._with_points()
        return after._decided(step) if self.due(step) else after

    def _with_points(self) -> Self:
        """What was drawn since the last point, as one more point of each source's curve."""
        curves = dict(self.curves)
        for name, (total, count) in self.means.sums.items():
            curves[name] = thinned((*curves.get(name, ()), (self.tokens, total / count)))
        return replace(self, curves=curves, means=SourceMeans())

    def _decided(self, step: int) -> Self:
        laws = {name: fit_curve(self.curves.get(name, ())) for name in self.prior}
        slopes = {name: law.slope(self.tokens) for name, law in laws.items() if law is not None}
        if not slopes:
            return self
        mean = sum(slopes.values()) / len(slopes)  # for a source of which too little was drawn
        average = self.average or self.prior
        says = preferences(self.prior, {n: slopes.get(n, mean) for n in self.prior}, self.drawn)
        # Mostly the mean of all that the laws have said: one fit alone is noisy.
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
    """rho = norm(prior * slope * sqrt(share drawn)), each at least 0.01 before they are normed again."""
    return floored(normed({name: prior[name] * slopes[name] * drawn[name] ** 0.5 for name in prior}), 0.01)


def thinned(points: Points) -> Points:
    """As they are up to POINTS; beyond, every two neighbours as one."""
    if len(points) <= POINTS:
        return points
    pairs = [points[i : i + 2] for i in range(0, len(points), 2)]
    return tuple((pair[-1][0], sum(loss for _, loss in pair) / len(pair)) for pair in pairs)


def fit_curve(points: Sequence[tuple[float, float]]) -> ScalingLaw | None:
    """The law of a source, without the first tenth of its points: the rate still warms up there. None of too few."""
    kept = [(n, loss) for n, loss in points[len(points) // 10 :] if loss > 0]
    return fit([n for n, _ in kept], [loss for _, loss in kept]) if len(kept) >= FEWEST else None
