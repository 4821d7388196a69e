"""The metrics of one update: losses, and those of the optimizer, the rollouts and the wait for targets.

Made by `loop`, written by `logs` and `progress`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from student_trainer.losses.metrics import LossMetrics

if TYPE_CHECKING:
    from student_trainer.optim.qk_clip import ClipReport


@dataclass(frozen=True)
class StepMetrics:
    """`losses`: over all ranks. `waited_s`: seconds waited for targets by the rank that waited longest.

    `rates`: learning rates by parameter group. `clipped`: in a run with QK-clip.
    `coefficients`: if they change during the run. `gradient_shares`: if they were measured, see `losses.weighting`.
    `mixture`: the batch's weights by source, if a policy changes them.
    `wrote_s`: seconds in which the student wrote a later batch. `rollout`: metrics of this batch if the student wrote
    it, see `RolloutSums`.
    """

    losses: LossMetrics
    waited_s: float
    rates: Mapping[str, float] = field(default_factory=dict)
    clipped: ClipReport | None = None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    gradient_shares: Mapping[str, float] = field(default_factory=dict)
    mixture: Mapping[str, float] = field(default_factory=dict)
    wrote_s: float | None = None
    rollout: Mapping[str, float] | None = None
