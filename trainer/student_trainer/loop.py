"""THE file to read first: `train` goes from step to step, `step` makes one update. Everything else serves these two.

    batch n -> its targets, asked for ahead of time -> forward, loss, backward, micro batch by micro batch -> update

Losses are sums; the one division by the count of all valid tokens of the batch is here. An update that is not finite is
never made. `build` puts a `Run` together, `main` calls `train`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from student_trainer import exit_codes, randomness
from student_trainer.losses.metrics import LossSums
from student_trainer.losses.terms import Needs
from student_trainer.losses.weighting import gradient_shares
from student_trainer.ranks import full_tensor
from student_trainer.reporting.step_metrics import StepMetrics
from student_trainer.rollouts.rollouts import concat
from student_trainer.state import TrainState
from student_trainer.students.sharding import Unsharded
from teacher_proto.errors import TeacherUnavailableError
from teacher_proto.process.stages import EVERY_S, stage

if TYPE_CHECKING:
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
    from student_trainer.students.student import Student
    from student_trainer.targets.guard import TargetGuard
    from student_trainer.targets.lookahead import Lookahead
    from student_trainer.targets.prefetch import Prefetch, Ready
    from student_trainer.targets.student_support import StudentSupport
    from teacher_proto.process.stopping import StopSignals

logger = logging.getLogger(__name__)
DONE, STOPPED = exit_codes.DONE, exit_codes.AGAIN


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
    state: TrainState
    student_support: StudentSupport | None = None
    lookahead: Lookahead | None = None
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
        norms = dict.fromkeys((term.name for term in terms), 0.0)
        if self.ranks.first and len(ready.micro[0].view.labels_N):
            self.unsharded.student.before_step(self.state.step)
            norms = self.unsharded.student.gradient_norms(ready.micro[0], terms, chunk_rows)
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

    def ask_at_students_ids(self, ready: Ready) -> Ready:
        """The batch with what the teacher says of the ids that the student finds likeliest, if a loss wants that, and
        with its rows of masked tokens by what follows them, if they are looked ahead of.
        """
        if self.lookahead is not None and ready.batch.kind == "data":
            self.unsharded.student.before_step(self.state.step)
            ready = self.lookahead.add(self.unsharded.student, ready, self.while_waiting)
        if self.student_support is None or not Needs.of(self.terms(ready.batch.kind)).late:
            return ready
        self.unsharded.student.before_step(self.state.step)
        return self.student_support.add(self.unsharded.student, ready, self.while_waiting)

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


def train(run: Run, started: float | None = None) -> int:
    """Train to the last step, or to `run.time_limit_s` after `started`, a monotonic time, now if not given. Returns
    DONE, or STOPPED after a signal; whatever else ends the run is raised.

    After every update: figures to the log, then evaluation and saving where they are due. A signal is obeyed at once,
    but while an update is made of its gradient, logged or saved; an update that has not come so far is dropped. The run
    is saved before it ends, by another thread where this one is stuck in a long native call.
    """
    rescued = run.signals.rescued(run.save_for_good) if run.ranks.alone else nullcontext()
    steps, started = run.settings.run.steps, time.monotonic() if started is None else started
    with run.signals.holding(), rescued:
        try:
            if run.evaluation_missing():
                run.evaluate()
            while run.state.step < steps:
                steps = advance(run, steps, started)
            if run.state.step == 0:  # of none: what is saved is how the student starts
                run.save()
            run.checkpoints.finish(last=True)
            with run.interruptible():
                run.evaluator.write_passage(run.student)
        except run.signals.Stop as stop:
            run.signals.obey()
            logger.warning("%s: %s", stop, f"saving at step {run.state.step}, to go on from there"
                           if run.state.step else "nothing is learnt yet, so nothing is saved")  # fmt: skip
            run.save_for_good()
            return STOPPED
        except TeacherUnavailableError:
            run.save_and_wait()
            raise
    return DONE


def advance(run: Run, steps: int, started: float) -> int:
    """One update with all that follows it. Returns the last step: `steps`, or this one where the time is over."""
    began = time.monotonic()
    run.unsharded.refresh()
    run.before = Before(randomness.capture(), run.losses)
    with run.ranks.sync_errors(), run.interruptible():
        run.signals.check()
        wrote_s = run.rollouts.write(run.state.step, run.signals.check) if run.rollouts is not None else None
        with stage(f"waiting for the targets of step {run.state.step + 1}", note=run.waiting, closing=False):
            ready = run.prefetch.next(run.while_waiting)
        run.guard.check(ready)
        ready = run.ask_at_students_ids(ready)
        run.meter.begin(run.state, ready.batch.kind, run.terms("data"), run.ask_at_students_ids, run.pause)
    metrics = replace(step(run, ready), wrote_s=wrote_s)
    policy = run.state.policy.observe(metrics.losses.by_name(), run.ranks, run.meter.take())
    run.state = TrainState(run.state.step + 1, run.state.tokens + metrics.losses.tokens, ready.state, policy)
    run.batch_weights.publish(policy)
    run.before = None
    run.log.step(run.state, metrics, time.monotonic() - began, run.prefetch.control.depth)
    if run.out_of_time(time.monotonic() - started):
        steps = run.state.step
    if run.evaluator.due(run.state.step, steps):
        run.evaluate()
    if run.checkpoints.due(run.state.step, steps):
        run.save()
    return steps


@dataclass(frozen=True, eq=False)
class Gradient:
    """That of a batch lies in the parameters' `grad`; this is its norm and what else is known of it."""

    terms: tuple[Term, ...]
    sums: LossSums
    norm: Tensor
    measured: dict[str, float]


def differentiate(run: Run, ready: Ready) -> Gradient:
    """Forward and backward passes, micro batch by micro batch. Changes nothing of the student.

    The loss is the sum over all terms and tokens divided by the number of valid tokens of the whole batch, so that it
    does not depend on how the batch is cut into micro batches.
    """
    count = run.ranks.total(sum(micro.view.count for micro in ready.micro))
    run.student.before_step(run.state.step)
    measured = run.measure(ready)
    terms = run.terms(ready.batch.kind)
    sums = LossSums(terms, ready.batch.source_names)
    what = f"computing update {run.state.step + 1}{', for which the student is compiled' if run.compiles else ''}"
    with stage(what, len(ready.micro), "micro batches", first_s=EVERY_S, closing=False) as doing:
        for micro in ready.micro if count else ():
            with run.optimizer.watching(micro.view.attention.document_ids_BT >= 0), run.meter.watching(micro):
                loss = run.student.loss(micro, terms, run.settings.distillation.chunk_rows)
            (loss.total / count).backward()
            sums.add(loss, micro)
            doing.done += 1
            run.compiles = False
            run.pause()
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in run.optimizer.parameters if parameter.grad is not None]
    )
    return Gradient(terms, sums, full_tensor(norm), measured)


def step(run: Run, ready: Ready) -> StepMetrics:
    """One update from one batch. NonFiniteError, before anything is changed, if loss or gradient is not finite."""
    number = run.state.step
    with run.interruptible():
        gradient = differentiate(run, ready)
        terms, norm = gradient.terms, gradient.norm
        losses = gradient.sums.metrics(norm, run.ranks)
        waited_s = run.ranks.largest(ready.waited_s)
    run.guard.require_finite(losses, gradient.sums, ready, run.student, number)
    if run.settings.optim.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(run.optimizer.parameters, run.settings.optim.clip_norm, norm)
    rates = run.optimizer.step(number)
    run.optimizer.zero_grad()
    rollout = ready.batch.rollout.over(run.ranks.totals).means() if ready.batch.rollout is not None else None
    varies = any(weighting.varies for weighting in run.losses.values())
    return StepMetrics(
        losses, waited_s, rates, run.optimizer.clipped, rollout=rollout,
        coefficients={term.name: term.coefficient for term in terms} if varies else {},
        gradient_shares=gradient_shares(terms, gradient.measured),
        mixture=ready.state.weights if run.state.policy.policy.varies else {},
    )  # fmt: skip
