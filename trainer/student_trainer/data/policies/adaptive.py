"""The base of all policies that change weights: a decision every `update_interval` updates, within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from student_trainer.data.policies.policy import Decision, Sketches, Weights
from student_trainer.data.policies.updates import within
from student_trainer.settings.mixture import AdaptiveMixture


@dataclass(frozen=True)
class Adaptive:
    """`prior`: the settings' weights of the sources whose weight is positive, which sum to 1. `unused`: the sources of
    weight 0, which are never drawn. `current`: the weights of the last decision.
    """

    settings: AdaptiveMixture
    prior: Weights
    unused: tuple[str, ...] = ()
    current: Weights = field(default_factory=dict)
    decision: Decision | None = None
    varies = True
    watches: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Any, initial: Weights) -> Self:
        """The policy before the first update."""
        prior = {name: weight for name, weight in initial.items() if weight > 0}
        unused = tuple(name for name in initial if name not in prior)
        return cls(settings=settings, prior=prior, unused=unused, current=prior)

    def take_in(self, sketches: Sketches) -> Self:
        """Ignored, except by `influence`."""
        return self

    def due(self, step: int) -> bool:
        """Whether a decision follows update `step`."""
        return (step + 1) % self.settings.update_interval == 0

    def decide(
        self, step: int, wanted: Weights, reasons: Mapping[str, Mapping[str, float]], note: str = "",
        low: Weights | None = None, high: Weights | None = None,
    ) -> Self:  # fmt: skip
        """The policy with `wanted` as its weights, limited by the settings' bounds and, within these, by `low` and
        `high`.

        A source gets at least `floor` times its prior weight, and at most `cap` or its prior weight, whichever is more.
        """
        least = {name: self.settings.floor * weight for name, weight in self.prior.items()}
        most = {name: max(self.settings.cap, weight) for name, weight in self.prior.items()}
        if low is not None and high is not None:
            least = {name: min(max(least[name], low[name]), most[name]) for name in least}
            most = {name: max(min(most[name], high[name]), least[name]) for name in most}
        weights = within(wanted, least, most)
        return replace(self, current=weights, decision=Decision(step, weights, reasons, note))

    def weights(self, step: int) -> Weights:
        return {**self.current, **dict.fromkeys(self.unused, 0.0)}

    def state(self) -> dict[str, Any]:
        return {"weights": dict(self.current)}

    def restored(self, state: Mapping[str, Any]) -> Self:
        """ValueError if the state belongs to other sources."""
        if state["weights"].keys() != self.prior.keys():
            raise ValueError(
                f"the mixture policy's state has the sources {sorted(state['weights'])}, but those with a weight are "
                f"{sorted(self.prior)}; set them back, or start a new run"
            )
        return replace(self, current={name: state["weights"][name] for name in self.prior})
