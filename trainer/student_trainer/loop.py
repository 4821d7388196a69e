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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from student_trainer import exit_codes
from student_trainer.data.mixture import MixtureState
from student_trainer.losses.weighting import gradient_shares
from student_trainer.on_policy.prompts import WrittenBatch
from student_trainer.on_policy.written import together
from student_trainer.students.sharding import WholeStudent, whole
from student_trainer.tally import StepFigures, Tally
from teacher_proto.errors import TeacherUnavailableError

if TYPE_CHECKING:
    from student_trainer.checkpoint import Checkpoints
    from student_trainer.data.batch import Batch
    from student_trainer.evaluate import Evaluator
    from student_trainer.logs import RunLog
    from student_trainer.losses.terms import Term
    from student_trainer.losses.weighting import Weighting
    from student_trainer.on_policy.written import WrittenBatches
    from student_trainer.optim.optimizer import Optimizer
    from student_trainer.ranks import Ranks
    from student_trainer.samples import SampleWriter
    from student_trainer.settings import Settings
    from student_trainer.signals import StopSignals
    from student_trainer.students.student import Student
    from student_trainer.targets.guard import TargetGuard
    from student_trainer.targets.prefetch import Prefetch, Ready
    from student_trainer.targets.student_support import StudentSupport

logger = logging.getLogger(__name__)
DONE, STOPPED = exit_codes.DONE, exit_codes.AGAIN


@dataclass(frozen=True)
class Place:
    """Where a run stands: updates made, tokens learnt from, and the mixture's state before the next batch."""

    step: int
    tokens: int
    mixture: MixtureState


@dataclass(eq=False)
class Run:
    """All that a run is made of. `place` is where it stands and moves with every step."""

    settings: Settings
    ranks: Ranks
    student: Student
    whole: WholeStudent
    weighting: Weighting
    optimizer: Optimizer
    prefetch: Prefetch
    guard: TargetGuard
    evaluator: Evaluator
    samples: SampleWriter
    checkpoints: Checkpoints
    log: RunLog
    signals: StopSignals
    place: Place
    student_support: StudentSupport | None = None
    written: WrittenBatches | None = None
    on_policy: Weighting | None = None

    def terms_for(self, batch: Batch) -> tuple[Term, ...]:
        """The loss on a batch: the student's own text has one of its own."""
        if isinstance(batch, WrittenBatch):
            assert self.on_policy is not None
            return self.on_policy.at(self.place.step)
        return self.weighting.at(self.place.step)

    def measure(self, ready: Ready) -> dict[str, float]:
        """The norms of the terms' gradients on the first micro batch of the first rank, where they are due; later steps
        go by them.
        """
        own = isinstance(ready.batch, WrittenBatch)
        if own or not ready.micro or not self.weighting.due(self.place.step):
            return {}
        terms, chunk_rows = self.weighting.measured_terms, self.settings.distillation.chunk_rows
        norms = dict.fromkeys((term.name for term in terms), 0.0)
        if self.ranks.first and len(ready.micro[0].labels_N):
            self.whole.student.before_step(self.place.step)
            norms = self.whole.student.gradient_norms(ready.micro[0], terms, chunk_rows)
        norms = json.loads(self.ranks.from_first(json.dumps(norms)))
        if not all(map(math.isfinite, norms.values())):
            return {}  # the step finds the same, and says where
        self.weighting = self.weighting.take_in(norms)
        return norms

    def write(self) -> float | None:
        """Let the student write the batch that is due, if it writes any. Returns the seconds that took."""
        return self.written.write(self.place.step, self.signals.check) if self.written else None

    def evaluate(self) -> None:
        """Held-out figures, and what the student writes, to the log."""
        self.log.evaluation(self.place.step, self.evaluator.evaluate(self.student))
        self.log.samples(self.place.step, self.samples.write())

    def ask_at_students_ids(self, ready: Ready) -> Ready:
        """The batch with what the teacher says of the ids that the student finds likeliest, if a loss wants that."""
        if self.student_support is None or all(term.support != "gather" for term in self.terms_for(ready.batch)):
            return ready
        self.whole.student.before_step(self.place.step)
        return self.student_support.add(self.whole.student, ready, self.while_waiting)

    def out_of_time(self, seconds: float) -> bool:
        """Whether the run's time is over, `seconds` after it was started: on all ranks alike, which all must ask."""
        limit, steps = self.settings.run.time_limit_s, self.settings.run.steps
        if limit is None or self.place.step == steps or self.ranks.largest(seconds) < limit:
            return False
        logger.warning("run.time_limit_s=%g is over: the run ends at step %d of %d", limit, self.place.step, steps)
        return True

    def save(self) -> None:
        """Save the run as it stands, in the background; `checkpoints.finish` waits for it."""
        written = together(self.ranks.gather(self.written.pending(self.place.step))) if self.written else {}
        self.checkpoints.save(self.place, self.student, self.optimizer, written, self.weighting.state())

    def while_waiting(self, waited_s: float) -> None:
        """What happens while a step stands still for its targets."""
        self.signals.check()
        self.guard.watch(waited_s, self.save if self.ranks.alone else self.cannot_save)

    def cannot_save(self) -> None:
        """Saving takes all ranks, and the others wait for this one."""
        logger.warning("the run is saved, by all ranks, when the wait ends or teacher.give_up_after_s has passed")


def train(run: Run, started: float | None = None) -> int:
    """Train to the last step, or to `run.time_limit_s` after `started`, a monotonic time, now if not given. Returns
    DONE, or STOPPED after a signal; whatever else ends the run is raised.

    After every update: figures to the log, then evaluation and saving where they are due. A signal is obeyed between
    two updates and while waiting, never inside an update; the run is saved before it ends.
    """
    steps, started = run.settings.run.steps, time.monotonic() if started is None else started
    if run.place.step == 0 and run.evaluator.due_at_start():
        run.evaluate()
    try:
        while run.place.step < steps:
            began = time.monotonic()
            run.whole.refresh()
            with run.ranks.together():
                run.signals.check()
                wrote_s = run.write()
                ready = run.prefetch.next(run.while_waiting)
                run.guard.check(ready)
                ready = run.ask_at_students_ids(ready)
            figures = replace(step(run, ready), wrote_s=wrote_s)
            run.place = Place(run.place.step + 1, run.place.tokens + figures.tokens, ready.state)
            run.log.step(run.place, figures, time.monotonic() - began, run.prefetch.control.depth)
            if run.out_of_time(time.monotonic() - started):
                steps = run.place.step
            if run.evaluator.due(run.place.step, steps):
                run.evaluate()
            if run.checkpoints.due(run.place.step, steps):
                run.save()
    except run.signals.Stop as stop:
        logger.warning("%s: saving at step %d, to go on from there", stop, run.place.step)
        run.save()
        run.checkpoints.finish()
        return STOPPED
    except TeacherUnavailableError:
        run.save()
        run.checkpoints.finish()
        raise
    run.checkpoints.finish(last=True)
    run.evaluator.write_passage(run.student)
    return DONE


def step(run: Run, ready: Ready) -> StepFigures:
    """One update from one batch. NonFiniteError, before anything is changed, if a loss or the gradient is not finite.

    The loss is the sum over all terms and tokens divided by the number of valid tokens of the whole batch, so that it
    does not depend on how the batch is cut into micro batches.
    """
    number = run.place.step
    count = run.ranks.total(sum(len(micro.labels_N) for micro in ready.micro))
    run.student.before_step(number)
    norms = run.measure(ready)
    terms = run.terms_for(ready.batch)
    tally = Tally(terms, ready.batch.source_names)
    for micro in ready.micro if count else ():
        with run.optimizer.watching(micro.document_ids_BT >= 0):
            loss = run.student.loss(micro, terms, run.settings.distillation.chunk_rows)
        (loss.total / count).backward()
        tally.add(loss, micro)
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in run.optimizer.parameters if parameter.grad is not None]
    )
    norm = whole(norm)
    figures = tally.figures(norm, ready.waited_s, run.ranks)
    run.guard.require_finite(figures, tally, ready, run.student, number)
    if run.settings.optim.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(run.optimizer.parameters, run.settings.optim.clip_norm, norm)
    rates = run.optimizer.step(number)
    run.optimizer.zero_grad()
    written = ready.batch.written.over(run.ranks) if isinstance(ready.batch, WrittenBatch) else None
    if run.weighting.varies or (run.on_policy is not None and run.on_policy.varies):
        figures = replace(figures, coefficients={term.name: term.coefficient for term in terms})
    shares = gradient_shares(terms, norms)
    return replace(figures, rates=rates, clipped=run.optimizer.clipped, written=written, gradient_shares=shares)
