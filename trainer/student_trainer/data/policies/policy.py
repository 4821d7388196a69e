"""The protocol of mixture policies, and the record of a decision. Each policy is a file here, listed in `decisions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

Weights = Mapping[str, float]  # by source; they need not sum to 1


@dataclass(frozen=True)
class Decision:
    """The weights that a policy chose after update `step`, counted from 0, and its reasons: metrics by source. `note`:
    further remarks for the log, such as a return to the prior.
    """

    step: int
    weights: Weights
    reasons: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, eq=False)
class Sketches:
    """Gradient sketches of one update: [size] float32 by source, and if a decision is due, also the probe's, with its
    loss per token.
    """

    by_source: Mapping[str, np.ndarray]
    probe: np.ndarray | None = None
    probe_loss: float | None = None


class MixturePolicy(Protocol):
    """A frozen record; `state` is what it has learnt from the run."""

    @property
    def varies(self) -> bool:
        """Whether weights ever change; if not, `weights` is never called."""
        ...

    @property
    def watches(self) -> tuple[str, ...]:
        """Metrics that it needs and that the loss may not provide, see `losses.watched`."""
        ...

    @property
    def decision(self) -> Decision | None:
        """The last decision."""
        ...

    def take_in(self, sketches: Sketches) -> Self:
        """The policy with an update's gradient sketches; called before `observe` for the same update."""
        ...

    def observe(self, step: int, metrics: Mapping[str, float]) -> Self:
        """The policy after update `step`, counted from 0.

        metrics: losses of the update over all ranks, by their names in metrics.jsonl: "loss", "loss/TERM",
        "source/NAME/TERM", "source/NAME/tokens", ... There are none for a source that the batch had nothing of.
        """
        ...

    def weights(self, step: int) -> Weights:
        """The weights for batch `step` + lag; called after update `step` was observed."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that `observe` has changed, in a form that JSON holds exactly."""
        ...

    def restored(self, state: Mapping[str, Any]) -> Self:
        """The policy with the state from a checkpoint."""
        ...


@dataclass(frozen=True)
class Static:
    """The weights of the settings throughout."""

    initial: Weights
    varies = False
    watches = ()
    decision = None

    def take_in(self, sketches: Sketches) -> Self:
        return self

    def observe(self, step: int, metrics: Mapping[str, float]) -> Self:
        return self

    def weights(self, step: int) -> Weights:
        return self.initial

    def state(self) -> dict[str, Any]:
        return {}

    def restored(self, state: Mapping[str, Any]) -> Self:
        return self
