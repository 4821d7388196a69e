"""Where a run stands. `loop` moves it on with every update, `checkpoint` keeps it, `reporting` writes of it."""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.data.mixture import MixtureState
from student_trainer.data.policies.decisions import STATIC, PolicyState


@dataclass(frozen=True)
class TrainState:
    """Updates made, tokens learnt from, the mixture's state before the next batch, and that of the policy over it."""

    step: int
    tokens: int
    mixture: MixtureState
    policy: PolicyState = STATIC
