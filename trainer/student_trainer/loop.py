"""The training loop, THE file to read first: `train` goes from step to step and saves when a signal
stops it, `step` makes one update.

    batch n -> its targets, requested ahead of time -> forward, loss, backward, micro batch by micro batch -> update

Losses are sums; they are divided once, here, by the number of valid tokens in the whole batch. An update with a loss or
gradient that is not finite is never made. `build` makes a `Run`, `main` calls `train`.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from student_trainer import exit_codes, randomness
from student_trainer.losses.metrics import LossSums
from student_trainer.losses.weighting import gradient_shares
from student_trainer.ranks import full_tensor
from student_trainer.reporting.step_metrics import StepMetrics
from student_trainer.run import Before, Run
from student_trainer.state import TrainState
from teacher_proto.errors import TeacherUnavailableError
from teacher_proto.process.stages import EVERY_S, stage

if TYPE_CHECKING:
    from student_trainer.losses.terms import Term
    from student_trainer.targets.prefetch import Ready

logger = logging.getLogger(__name__)
DONE, STOPPED = exit_codes.DONE, exit_codes.AGAIN


def train(run: Run, started: float | None = None) -> int:
    """Train to the last step, or until `run.time_limit_s` after `started` (a monotonic time, by default now). Returns
    DONE, or STOPPED after a signal; whatever else ends the run is raised.

    After every update the metrics are logged, then evaluation and saving follow if they are due. A signal takes effect
    at once, except while an update is applied, logged or saved; an update that has not come that far is dropped. The
    run is saved before it ends, by another thread if this one is stuck in a long native call.
    """
    rescued = run.signals.rescued(run.save_for_good) if run.ranks.alone else nullcontext()
    steps, started = run.settings.run.steps, time.monotonic() if started is None else started
    with run.signals.holding(), rescued:
        try:
            if run.evaluation_missing():
                run.evaluate()
            while run.state.step < steps:
                steps = advance(run, steps, started)
            if run.state.step == 0:  # a run of 0 steps saves the initial student
                run.save()
            run.checkpoints.finish(last=True)
            with run.interruptible():
                run.evaluator.write_passage(run.student)
        except run.signals.Stop as stop:
            run.signals.obey()
            logger.warning("%s: %s", stop, f"saving at step {run.state.step}, to resume from there"
                           if run.state.step else "no update was made yet, so there is nothing to save")  # fmt: skip
            run.save_for_good()
            return STOPPED
        except TeacherUnavailableError:
            run.save_and_wait()
            raise
    return DONE


def advance(run: Run, steps: int, started: float) -> int:
    """One update and all that follows it. Returns the run's last step: `steps`, or this one if the time is over."""
    began = time.monotonic()
    run.refresh()
    # What a save during the update has to store instead: an update that is dropped leaves no trace.
    run.before = Before(randomness.capture(), run.losses)
    with run.ranks.sync_errors(), run.interruptible():
        run.signals.check()
        wrote_s = run.rollouts.write(run.state.step, run.signals.check) if run.rollouts is not None else None
        with stage(f"waiting for the targets of step {run.state.step + 1}", note=run.waiting, closing=False):
            ready = run.prefetch.next(run.while_waiting)
        run.guard.check(ready)
        # These requests depend on the weights that this update starts from, so they cannot be made ahead of time.
        ready = run.add_late_targets(ready)
        run.meter.begin(run.state, ready.batch.kind, run.terms("data"), run.add_late_targets, run.pause)
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
    """Norm and metrics of a batch's gradient, which itself is in the parameters' `grad`."""

    terms: tuple[Term, ...]
    sums: LossSums
    norm: Tensor
    measured: dict[str, float]


def differentiate(run: Run, ready: Ready) -> Gradient:
    """Forward and backward passes, micro batch by micro batch. Does not change the student's weights.

    The loss is the sum over all terms and tokens divided by the number of valid tokens of the whole batch, so that it
    does not depend on how the batch is cut into micro batches.
    """
    count = run.ranks.total(sum(micro.view.count for micro in ready.micro))
    run.student.before_step(run.state.step)
    measured = run.measure(ready)
    terms = run.terms(ready.batch.kind)
    sums = LossSums(terms, ready.batch.source_names)
    what = f"computing update {run.state.step + 1}{', compiling the student first' if run.compiles else ''}"
    with stage(what, len(ready.micro), "micro batches", first_s=EVERY_S, closing=False) as doing:
        for micro in ready.micro if count else ():
            with run.optimizer.watching(micro.view.attention.document_ids_BT >= 0), run.meter.watching(micro):
                loss = run.student.loss(micro, terms, run.settings.distillation.chunk_rows)
            # The one division, by all ranks' tokens: the gradient of sum / count, however micro batches are cut.
            (loss.total / count).backward()
            sums.add(loss, micro)
            doing.done += 1
            run.compiles = False
            run.pause()
    # sqrt of the sum of squares over all parameters, of sharded ones over all ranks.
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in run.optimizer.parameters if parameter.grad is not None]
    )
    return Gradient(terms, sums, full_tensor(norm), measured)


def step(run: Run, ready: Ready) -> StepMetrics:
    """One update from one batch. NonFiniteError if loss or gradient is not finite, before anything has changed."""
    number = run.state.step
    with run.interruptible():
        gradient = differentiate(run, ready)
        terms, norm = gradient.terms, gradient.norm
        losses = gradient.sums.metrics(norm, run.ranks)
        waited_s = run.ranks.largest(ready.waited_s)
    # Up to here a signal drops the update, and nothing has changed. From here on a finite update is completed.
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
