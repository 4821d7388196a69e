"""All that is known of one update: its losses, and what optimizer, rollouts and the wait for targets add.

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
    """`losses`: of all ranks. `waited_s`: seconds without targets, of the rank that waited longest.

    `rates`: learning rates by group of parameters. `clipped`: of a run with QK-clip.
    `coefficients` where they change in the run; `gradient_shares` where they were measured, see `losses.weighting`.
    `mixture`: weight by source that the batch was drawn by, where a policy changes them.
    `wrote_s`: seconds in which the student wrote a later batch; `rollout`: of a batch that it wrote, see
    `RolloutSums`.
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
