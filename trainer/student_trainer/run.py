"""The parts of a run, and what it does besides its updates: evaluate and save. Built by `build`, advanced by
`loop`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from student_trainer import randomness
from student_trainer.rollouts.rollouts import concat
from teacher_proto.errors import InvalidTargetsError

if TYPE_CHECKING:
    from torch import Tensor

    from student_trainer.batch.batch import Kind
    from student_trainer.checkpoint.checkpoints import Checkpoints
    from student_trainer.data.policies.decisions import BatchWeights
    from student_trainer.evaluation.evaluator import Evaluator
    from student_trainer.evaluation.influence import NoMeter
    from student_trainer.evaluation.samples import SampleWriter
    from student_trainer.losses.terms import Term
    from student_trainer.losses.weighting import Weighting
    from student_trainer.optim.optimizer import Optimizer
    from student_trainer.ranks import Ranks
    from student_trainer.reporting.logs import RunLog
    from student_trainer.rollouts.rollouts import RolloutStream
    from student_trainer.settings import Settings
    from student_trainer.state import TrainState
    from student_trainer.students.sharding import Unsharded
    from student_trainer.students.student import Student
    from student_trainer.targets.guard import TargetGuard
    from student_trainer.targets.late import LateQueries
    from student_trainer.targets.prefetch import Prefetch, Ready
    from teacher_proto.process.stopping import StopSignals

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Before:
    """State that changes while an update is still computed. A save during an update uses this copy, as if the update
    had not begun.
    """

    random: tuple[dict[str, Tensor], dict[str, Any]]
    losses: Mapping[Kind, Weighting]


@dataclass(eq=False)
class Run:
    """The parts of a run. `state` is replaced after every step; `before` is set during an update. `waiting` describes
    the targets that are being waited for.
    """

    settings: Settings
    ranks: Ranks
    student: Student
    unsharded: Unsharded
    losses: Mapping[Kind, Weighting]
    optimizer: Optimizer
    prefetch: Prefetch
    batch_weights: BatchWeights
    guard: TargetGuard
    evaluator: Evaluator
    meter: NoMeter
    samples: SampleWriter
    checkpoints: Checkpoints
    log: RunLog
    signals: StopSignals
    late: LateQueries
    state: TrainState
    rollouts: RolloutStream | None = None
    waiting: Callable[[], str] = str
    before: Before | None = None
    compiles: bool = False  # whether the next update has to compile the student first

    def interruptible(self) -> AbstractContextManager[None]:
        """A block that a signal ends at once. Several ranks instead stop together, when each reaches `pause`."""
        return self.signals.raising() if self.ranks.alone else nullcontext()

    def pause(self) -> None:
        """Call it where all ranks can stop together; raises if any has received a signal."""
        with self.ranks.sync_errors():
            self.signals.check()

    def terms(self, kind: Kind) -> tuple[Term, ...]:
        """The loss on a batch of this kind."""
        return self.losses[kind].at(self.state.step)

    def measure(self, ready: Ready) -> dict[str, float]:
        """The norms of the terms' gradients on the first rank's first micro batch, if due; later steps use them."""
        weighting = self.losses[ready.batch.kind]
        if not ready.micro or not weighting.due(self.state.step):
            return {}
        terms, chunk_rows = weighting.measured_terms, self.settings.distillation.chunk_rows
        # Only the first rank measures, and all take its numbers; norms of 0 change nothing.
        norms = dict.fromkeys((term.name for term in terms), 0.0)
        if self.ranks.first and len(ready.micro[0].view.labels_N):
            norms = self.unsharded.at(self.state.step).gradient_norms(ready.micro[0], terms, chunk_rows)
        norms = json.loads(self.ranks.from_first(json.dumps(norms)))
        if not all(map(math.isfinite, norms.values())):
            return {}  # the step will find the same, and report where
        self.losses = {**self.losses, ready.batch.kind: weighting.take_in(norms)}
        return norms

    def evaluate(self) -> None:
        """Log held-out metrics and samples of the student's text; if a signal comes, neither."""
        with self.interruptible():
            figures = self.evaluator.evaluate(self.student, self.pause)
            samples = self.samples.write()
        self.log.evaluation(self.state.step, figures)
        self.log.samples(self.state.step, samples)

    def evaluation_missing(self) -> bool:
        """Whether this step's evaluation is still to be made: at the start, or after a signal interrupted it. All ranks
        get the same answer.
        """
        if self.state.step == 0:
            return self.evaluator.due_at_start()
        due = self.evaluator.due(self.state.step, self.settings.run.steps)
        return due and bool(self.ranks.largest(self.ranks.first and self.log.evaluated < self.state.step))

    def refresh(self) -> None:
        """Gather the unsharded student on this rank, if the next update has passes that a rank makes by itself. All
        ranks take part, so all must come to the same decision: from settings and step only, and before waiting for
        anything that one of them may not get.
        """
        step, rollouts = self.state.step, self.rollouts
        kind: Kind = "rollout" if rollouts is not None and rollouts.is_rollout(step) else "data"
        probes = self.meter.probes(self.state) and self.late.due("data", self.terms("data"))
        writes = rollouts is not None and rollouts.due(step)
        if writes or probes or self.late.due(kind, self.terms(kind)) or self.losses[kind].due(step):
            self.unsharded.refresh(step)

    def add_late_targets(self, ready: Ready) -> Ready:
        """The batch with targets that depend on the student's weights added, if a loss needs them. Invalid ones are
        dumped like those that were fetched ahead.
        """
        terms = self.terms(ready.batch.kind)
        if not self.late.due(ready.batch.kind, terms):
            return ready
        try:
            return self.late.add(self.unsharded.at(self.state.step), ready, terms, self.while_waiting)
        except InvalidTargetsError as error:
            raise self.guard.refuse(ready.batch, ready.targets, error) from error

    def out_of_time(self, seconds: float) -> bool:
        """Whether the time limit is over, `seconds` after the start. All ranks must call it and get the same answer."""
        limit, steps = self.settings.run.time_limit_s, self.settings.run.steps
        if limit is None or self.state.step == steps or self.ranks.largest(seconds) < limit:
            return False
        logger.warning("run.time_limit_s=%g is reached: the run ends at step %d of %d", limit, self.state.step, steps)
        return True

    def save(self) -> None:
        """Save the run as the last update left it, in the background; `checkpoints.finish` waits for it."""
        rollouts = concat(self.ranks.gather(self.rollouts.pending(self.state.step))) if self.rollouts else {}
        # Between updates the current state, during one the state before it.
        before = self.before or Before(randomness.capture(), self.losses)
        balance = before.losses["data"].state()
        self.checkpoints.save(self.state, self.student, self.optimizer, rollouts, balance, before.random)

    def save_and_wait(self) -> None:
        """Save, and wait until it is written. A run without any update has nothing to save."""
        if self.state.step > 0:
            self.save()
            self.checkpoints.finish()

    def save_for_good(self) -> None:
        """Save after a signal, and wait for the upload too, however long it takes. Another thread calls this if the
        main thread is stuck in a native call, which has not changed the student.
        """
        self.save_and_wait()
        self.checkpoints.close()

    def while_waiting(self, waited_s: float) -> None:
        """Called while a step waits for its targets."""
        self.signals.check()
        with self.signals.holding():
            self.guard.watch(waited_s, self.save if self.ranks.alone else None)
