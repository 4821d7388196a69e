"""The mixture policies by name, and how their decisions reach the data: `PolicyState` is part of a run's state,
`BatchWeights` passes it to the thread that makes batches. A new policy is a class in a file of its own, a line in
`POLICIES`, and a record of its settings in `settings.mixture`.

The lag is fixed, so a batch stays a function of (settings, mixture state, number), however many are prepared ahead. If
batch n + lag is requested before update n, the thread that makes batches waits for the update. Used by `loop`, which
reports updates, and by `stream`, which asks for weights.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from student_trainer.data.mixture import normalised
from student_trainer.data.policies.ado import Ado
from student_trainer.data.policies.gap import Divergence, Excess
from student_trainer.data.policies.influence import Influence
from student_trainer.data.policies.policy import Decision, MixturePolicy, Sketches, Static, Weights
from student_trainer.ranks import ALONE, Ranks
from student_trainer.settings.data import DataSettings

POLL_S = 0.2

# By `data.mixture.policy`: a function of the policy's own settings and the sources' initial weights.
POLICIES: dict[str, Callable[[Any, Weights], MixturePolicy]] = {
    "static": lambda settings, initial: Static(initial),
    "excess": Excess.of,
    "divergence": Divergence.of,
    "ado": Ado.of,
    "influence": Influence.of,
}


@dataclass(frozen=True)
class PolicyState:
    """A policy before update `step`, and its decisions for batches from `step` on, by batch number.

    A batch that has no decision and will get none uses the weights of the previous batch: the first `lag` batches of a
    run, and those after a checkpoint with another lag.
    """

    policy: MixturePolicy
    lag: int
    step: int = 0
    decided: Mapping[int, Weights] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: DataSettings) -> PolicyState:
        """The state before the first update."""
        initial = normalised({name: source.weight for name, source in settings.sources.items()})
        return cls(POLICIES[settings.mixture.policy](settings.mixture, initial), settings.mixture.lag)

    def observe(
        self, metrics: Mapping[str, float], ranks: Ranks = ALONE, sketches: Sketches | None = None
    ) -> PolicyState:
        """The state after one more update. All ranks must call it; the first rank's decision holds for all."""
        if not self.policy.varies:
            return self
        policy = self.policy if sketches is None else self.policy.take_in(sketches)
        policy = policy.observe(self.step, metrics)
        weights = normalised(json.loads(ranks.from_first(json.dumps(dict(policy.weights(self.step))))))
        # Batches up to this update are made, so their decisions are dropped.
        decided = {number: weights for number, weights in self.decided.items() if number > self.step}
        return replace(self, policy=policy, step=self.step + 1, decided=decided | {self.step + self.lag: weights})

    @property
    def decision(self) -> Decision | None:
        """The decision that followed the last update, if there was one."""
        made = self.policy.decision
        return made if made is not None and made.step == self.step - 1 else None

    def to_json(self) -> dict[str, Any] | None:
        """For a checkpoint, with floats bit for bit; None if the policy has no state."""
        if not self.policy.varies:
            return None
        return {"policy": self.policy.state(), "decided": {str(number): dict(w) for number, w in self.decided.items()}}

    def restored(self, step: int, state: Mapping[str, Any] | None) -> PolicyState:
        """The state before update `step`, from a checkpoint; `state` is None if it was saved without an adaptive
        policy.
        """
        if state is None:
            return replace(self, step=step)
        decided = {int(number): weights for number, weights in state["decided"].items()}
        return replace(self, policy=self.policy.restored(state["policy"]), step=step, decided=decided)


STATIC = PolicyState(Static({}), lag=1)


class BatchWeights:
    """Passes a run's decisions from the training thread to the one that makes batches."""

    def __init__(self, state: PolicyState):
        self._changed = threading.Condition()
        self._state = state
        self._first_decided = state.step + state.lag  # the first batch that this process decides about

    def publish(self, state: PolicyState) -> None:
        """Make the state after an update known to the other thread."""
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def wait_for(self, number: int, closed: threading.Event) -> Weights | None:
        """The weights from batch `number` on. None: the previous weights stay, or `closed` was set while waiting."""
        if not self._state.policy.varies:
            return None
        with self._changed:
            # Decided after update number - lag, which needs only earlier batches, so the wait ends.
            while number >= self._first_decided and number not in self._state.decided and not closed.is_set():
                self._changed.wait(POLL_S)
            return self._state.decided.get(number)
