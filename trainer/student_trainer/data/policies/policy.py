"""What a mixture policy is, and the record of what it decides. Each is a file beside this one, named in `decisions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

Weights = Mapping[str, float]  # by source; they need not sum to 1


@dataclass(frozen=True)
class Decision:
    """The weights that a policy chose after update `step`, counted from 0, and its reasons: figures by source. `note`
    says what else there is to say, as that it went back to the prior.
    """

    step: int
    weights: Weights
    reasons: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, eq=False)
class Sketches:
    """What was measured of gradients in one update: by source [size] float32, and where a decision is due that of the
    probe, with the probe's loss a token.
    """

    by_source: Mapping[str, np.ndarray]
    probe: np.ndarray | None = None
    probe_loss: float | None = None


class MixturePolicy(Protocol):
    """A frozen record; what it has learnt of the run is its state."""

    @property
    def varies(self) -> bool:
        """Whether weights ever change. Those of a policy that says no are never asked for."""
        ...

    @property
    def watches(self) -> tuple[str, ...]:
        """Figures that it goes by and that the loss may not have, see `losses.watched`."""
        ...

    @property
    def decision(self) -> Decision | None:
        """The last one."""
        ...

    def take_in(self, sketches: Sketches) -> Self:
        """With what was measured of an update's gradients, ahead of `observe` for the same update."""
        ...

    def observe(self, step: int, metrics: Mapping[str, float]) -> Self:
        """The policy after update `step`, counted from 0.

        metrics: losses of the update over all ranks, by their names in metrics.jsonl: "loss", "loss/TERM",
        "source/NAME/TERM", "source/NAME/tokens", ... A source of which the batch had nothing has none.
        """
        ...

    def weights(self, step: int) -> Weights:
        """What batch `step` + lag is drawn by; asked for after update `step` is observed."""
        ...

    def state(self) -> dict[str, Any]:
        """All that `observe` has changed, as JSON holds it exactly."""
        ...

    def restored(self, state: Mapping[str, Any]) -> Self:
        """With a state out of a checkpoint."""
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
