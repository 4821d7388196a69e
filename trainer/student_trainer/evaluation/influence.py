"""Measurements for the mixture policy `influence`: sketches of the sources' gradients, taken during regular updates,
and of the probe's gradient when a decision is due. Built by `open`, called by `run` and `loop`.

The probe is measured just before the update after which the decision is made, with the same parameters as that update.
This changes nothing in the student, and if the update is abandoned, so is the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from student_trainer.batch.batch import Kind
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.data.policies.influence import Influence
from student_trainer.data.policies.policy import Sketches
from student_trainer.losses.terms import Term
from student_trainer.ranks import Ranks, full_tensor
from student_trainer.settings import Settings
from student_trainer.settings.mixture import InfluenceMixture
from student_trainer.state import TrainState
from student_trainer.students.gradient_sketches import GradientSketches, choose
from student_trainer.students.student import Student
from student_trainer.targets.prefetch import Ready
from teacher_proto.process.stages import stage

AddTargets = Callable[[Ready], Ready]  # adds to a batch the targets at the student's likeliest ids


class HasMoments(Protocol):
    """An optimizer, as far as it is needed here."""

    def state(self) -> dict[str, Tensor]: ...

    def zero_grad(self) -> None: ...


class NoMeter:
    """Does nothing, for runs whose mixture does not depend on gradients."""

    def probes(self, state: TrainState) -> bool:
        """Whether `begin` will measure the probe before the next update. All ranks agree on it."""
        return False

    def begin(
        self, state: TrainState, kind: Kind, terms: tuple[Term, ...], add_targets: AddTargets, pause: Callable[[], None]
    ) -> None:
        """See `InfluenceMeter`."""

    def watching(self, micro: MicroBatch) -> AbstractContextManager[None]:
        return nullcontext()

    def take(self) -> Sketches | None:
        return None


class InfluenceMeter(NoMeter):
    """Call `begin` before an update, `watching` around each of its forward passes, `take` after it. `probe`: batches
    with their targets, cut into micro batches for this student.
    """

    def __init__(
        self, settings: Settings, student: Student, optimizer: HasMoments, sources: Sequence[str],
        probe: Sequence[Ready], ranks: Ranks,
    ):  # fmt: skip
        mixture = settings.data.mixture
        assert isinstance(mixture, InfluenceMixture)
        self._settings, self._optim, self._chunk_rows = mixture, settings.optim, settings.distillation.chunk_rows
        self._student, self._optimizer, self._probe, self._ranks = student, optimizer, tuple(probe), ranks
        self._sources = tuple(sources)
        chosen = choose(student.model, mixture.modules, mixture.module_count)
        self._sketches = GradientSketches(student, chosen, len(self._sources), mixture.sketch_size, settings.run.seed)
        self._names = [name for each in chosen for name in each.parameters]
        self._active = False
        self._probed: tuple[Tensor, float] | None = None

    def probes(self, state: TrainState) -> bool:
        policy = state.policy.policy
        assert isinstance(policy, Influence)
        return policy.due(state.step)

    def begin(
        self, state: TrainState, kind: Kind, terms: tuple[Term, ...], add_targets: AddTargets, pause: Callable[[], None]
    ) -> None:
        """To be called by all ranks before update `state.step`. `pause` may raise to abandon the update."""
        policy = state.policy.policy
        assert isinstance(policy, Influence)
        self._active = kind == "data" and policy.sketched(state.step)
        self._probed = None
        if self.probes(state):
            self._student.before_step(state.step)
            self._probed = self._measure(
                [micro for each in self._probe for micro in add_targets(each).micro], terms, pause
            )
        self._sketches.scales = self._preconditioners() if self._active and self._settings.precondition else {}

    def watching(self, micro: MicroBatch) -> AbstractContextManager[None]:
        """A context for one forward pass of the update."""
        return self._sketches.watching(micro) if self._active else nullcontext()

    def take(self) -> Sketches | None:
        """The update's measurements over all ranks, which must all call it; None if nothing was due."""
        if not self._active and self._probed is None:
            return None
        by_source = {}
        if self._active:
            sums = self._ranks.add_up(self._sketches.take()).numpy()
            by_source = {name: sums[place] for place, name in enumerate(self._sources)}
        if self._probed is None:
            return Sketches(by_source)
        sketch, loss = self._probed
        return Sketches(by_source, sketch.numpy(), loss)

    def _measure(
        self, micros: Sequence[MicroBatch], terms: tuple[Term, ...], pause: Callable[[], None]
    ) -> tuple[Tensor, float]:
        """The sketch of the probe's gradient, and its loss per token."""
        # The probe's gradient is not preconditioned: Adam's step is P g_source, and its gain <g_probe, P g_source>.
        self._sketches.scales = {}
        count = self._ranks.total(sum(micro.view.count for micro in micros))
        lost = torch.zeros((), dtype=torch.float64)
        with stage("measuring the probe", len(micros), "micro batches", closing=False) as doing:
            for micro in micros:
                micro = micro.to(self._student.device)
                with self._sketches.watching(micro, one_source=True):
                    loss = self._student.loss(micro, terms, self._chunk_rows)
                (loss.total / max(count, 1)).backward()
                lost += loss.total.detach().double().cpu()
                doing.done += 1
                pause()
        # The probe's gradients must not enter the update.
        self._optimizer.zero_grad()
        (total,) = self._ranks.totals([float(lost)])
        return self._ranks.add_up(self._sketches.take())[0], total / max(count, 1)

    def _preconditioners(self) -> dict[str, Tensor]:
        """1 / (sqrt(v) + eps) by parameter, from Adam's second moments, which exist from the second update on."""
        state = self._optimizer.state()
        scales = {}
        for name in self._names:
            if (second := state.get(f"{name}//exp_avg_sq")) is None:
                continue
            # Adam's v / (1 - beta2^t): without this correction early estimates are too small.
            corrected = full_tensor(second).float() / (1.0 - self._optim.betas[1] ** float(state[f"{name}//step"]))
            scales[name] = 1.0 / (corrected.sqrt() + self._optim.eps)
        return scales
