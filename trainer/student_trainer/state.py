"""The state of a run between updates. `loop` replaces it, `checkpoint` saves it, `reporting` logs it."""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.data.mixture import MixtureState
from student_trainer.data.policies.decisions import STATIC, PolicyState


@dataclass(frozen=True)
class TrainState:
    """Updates made, tokens trained on, the mixture's state before the next batch, and the state of its policy."""

    step: int
    tokens: int
    mixture: MixtureState
    policy: PolicyState = STATIC
