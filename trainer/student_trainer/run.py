"""All that a run is made of, and what it does beside its updates: evaluate, save, stop. Put together by `build`, moved
on by `loop`.
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
    """What an update changes before it is made. A run that is saved in the midst of one is saved with these, as if the
    update had not been begun.
    """

    random: tuple[dict[str, Tensor], dict[str, Any]]
    losses: Mapping[Kind, Weighting]


@dataclass(eq=False)
class Run:
    """All that a run is made of. `state` is where it stands and moves with every step; `before` is there while an
    update is under way. `waiting` says what is known of targets that are waited for.
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
        """A block that a signal ends at once. Several ranks stop together instead, where each comes to `pause`."""
        return self.signals.raising() if self.ranks.alone else nullcontext()

    def pause(self) -> None:
        """Called where all ranks can stop together."""
        with self.ranks.sync_errors():
            self.signals.check()

    def terms(self, kind: Kind) -> tuple[Term, ...]:
        """The loss on a batch of this kind."""
        return self.losses[kind].at(self.state.step)

    def measure(self, ready: Ready) -> dict[str, float]:
        """The norms of the terms' gradients on the first micro batch of the first rank, where they are due; later steps
        go by them.
        """
        weighting = self.losses[ready.batch.kind]
        if not ready.micro or not weighting.due(self.state.step):
            return {}
        terms, chunk_rows = weighting.measured_terms, self.settings.distillation.chunk_rows
        # The first rank measures one micro batch and all take its numbers; norms of 0 change nothing.
        norms = dict.fromkeys((term.name for term in terms), 0.0)
        if self.ranks.first and len(ready.micro[0].view.labels_N):
            norms = self.unsharded.at(self.state.step).gradient_norms(ready.micro[0], terms, chunk_rows)
        norms = json.loads(self.ranks.from_first(json.dumps(norms)))
        if not all(map(math.isfinite, norms.values())):
            return {}  # the step finds the same, and says where
        self.losses = {**self.losses, ready.batch.kind: weighting.take_in(norms)}
        return norms

    def evaluate(self) -> None:
        """Held-out figures, and what the student writes, to the log: both or, where a signal comes, neither."""
        with self.interruptible():
            figures = self.evaluator.evaluate(self.student, self.pause)
            samples = self.samples.write()
        self.log.evaluation(self.state.step, figures)
        self.log.samples(self.state.step, samples)

    def evaluation_missing(self) -> bool:
        """Whether the evaluation that belongs to this step has still to be made, on any rank's word: at the start, and
        where a signal came into it.
        """
        if self.state.step == 0:
            return self.evaluator.due_at_start()
        due = self.evaluator.due(self.state.step, self.settings.run.steps)
        return due and bool(self.ranks.largest(self.ranks.first and self.log.evaluated < self.state.step))

    def refresh(self) -> None:
        """Have the student whole on this rank, for the passes of the next update that a rank makes by itself. All ranks
        gather it, so all must find alike that there are some: by settings and step alone, before anything is waited
        for that one of them may not get.
        """
        step, rollouts = self.state.step, self.rollouts
        kind: Kind = "rollout" if rollouts is not None and rollouts.is_rollout(step) else "data"
        probes = self.meter.probes(self.state) and self.late.due("data", self.terms("data"))
        writes = rollouts is not None and rollouts.due(step)
        if writes or probes or self.late.due(kind, self.terms(kind)) or self.losses[kind].due(step):
            self.unsharded.refresh(step)

    def ask_late(self, ready: Ready) -> Ready:
        """The batch with what is asked about it out of the student's weights, if a loss wants that."""
        terms = self.terms(ready.batch.kind)
        if not self.late.due(ready.batch.kind, terms):
            return ready
        return self.late.add(self.unsharded.at(self.state.step), ready, terms, self.while_waiting)

    def out_of_time(self, seconds: float) -> bool:
        """Whether the run's time is over, `seconds` after it was started: on all ranks alike, which all must ask."""
        limit, steps = self.settings.run.time_limit_s, self.settings.run.steps
        if limit is None or self.state.step == steps or self.ranks.largest(seconds) < limit:
            return False
        logger.warning("run.time_limit_s=%g is over: the run ends at step %d of %d", limit, self.state.step, steps)
        return True

    def save(self) -> None:
        """Save the run as the last update left it, in the background; `checkpoints.finish` waits for it."""
        rollouts = concat(self.ranks.gather(self.rollouts.pending(self.state.step))) if self.rollouts else {}
        # Between two updates what is now; in the midst of one what was before it.
        before = self.before or Before(randomness.capture(), self.losses)
        balance = before.losses["data"].state()
        self.checkpoints.save(self.state, self.student, self.optimizer, rollouts, balance, before.random)

    def save_and_wait(self) -> None:
        """Save it to the end; a run that has learnt nothing yet has nothing to save."""
        if self.state.step > 0:
            self.save()
            self.checkpoints.finish()

    def save_for_good(self) -> None:
        """Save it, and wait for the copy elsewhere: what is done after a signal, however long it takes. Another thread
        does it where the main thread is stuck in a native call, which has changed nothing of the student.
        """
        self.save_and_wait()
        self.checkpoints.close()

    def while_waiting(self, waited_s: float) -> None:
        """What happens while a step stands still for its targets."""
        self.signals.check()
        with self.signals.holding():
            self.guard.watch(waited_s, self.save if self.ranks.alone else None)
