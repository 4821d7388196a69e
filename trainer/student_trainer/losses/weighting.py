"""The coefficient of every term at a step: its setting times its schedule, or from its share of the gradient. Made from
the settings by `build`, used by `loop`.

A mixture policy may need metrics that the loss does not have: they are terms with coefficient 0, which change no
gradient. Token terms among them share the softmax that the loss computes anyway; the teacher's cross-entropy is in
every target.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from student_trainer.batch.batch import Kind
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.losses.balance import GradientBalance
from student_trainer.losses.kinds import terms_of, token_term
from student_trainer.losses.terms import Captured, Needs, StatesTerm, Term
from student_trainer.settings import DistillationSettings, OnPolicySettings, Settings
from student_trainer.settings.terms import CrossEntropySettings


@dataclass(frozen=True)
class TeacherCrossEntropy(StatesTerm):
    """The teacher's own cross-entropy with the data's next token, which does not depend on the student."""

    @property
    def needs(self) -> Needs:
        return Needs(kinds=frozenset({"top_k"}))

    def values(self, captured: Captured, micro: MicroBatch, config: Any) -> Tensor:
        """[N] float32. ValueError if the targets lack it."""
        teacher = micro.teacher
        if teacher is None or teacher.next_logprob_N is None:
            raise ValueError(
                "data.mixture.policy=excess needs the teacher's logprob of the data's next token (next_logprob), which "
                "these targets don't have: use a teacher that returns it, or policy divergence"
            )
        return -teacher.next_logprob_N.float()


WATCHED: dict[str, Term] = {
    "student_cross_entropy": token_term("student_cross_entropy", "cross_entropy", 0.0),
    "teacher_cross_entropy": TeacherCrossEntropy("teacher_cross_entropy", CrossEntropySettings(coefficient=0.0), 0.0),
    "teacher_divergence": token_term("teacher_divergence", "top_k_kl", 0.0),
}


def watched_terms(names: Iterable[str], own: Collection[str]) -> tuple[Term, ...]:
    """The terms of these names. ValueError if the loss itself has a term of the same name (`own`)."""
    names = tuple(names)
    if taken := [name for name in names if name in own]:
        raise ValueError(f"the loss has a term '{taken[0]}', which is also a metric of data.mixture: rename the term")
    return tuple(WATCHED[name] for name in names)


Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Weighting:
    """`terms` with the coefficients of the settings. `schedules`: by term, what its coefficient is multiplied by.

    The coefficient of a balanced term is not its own, but its reference's times what `balance` gives. `watched`: terms
    with coefficient 0, for their metrics.
    """

    terms: tuple[Term, ...]
    schedules: Mapping[str, Points] = field(default_factory=dict)
    balance: GradientBalance | None = None
    watched: tuple[Term, ...] = ()

    @property
    def varies(self) -> bool:
        return bool(self.schedules) or self.balance is not None

    def at(self, step: int) -> tuple[Term, ...]:
        """The terms with the coefficients of update `step`, counted from 0."""
        own = {term.name: term.coefficient for term in self.terms}
        if self.balance is not None:
            # Balanced coefficients are relative to the reference's, whose setting still scales all of them.
            scale = own[self.balance.reference]
            own |= {name: scale * balanced for name, balanced in self.balance.coefficients().items()}
        return (
            tuple(
                replace(term, coefficient=own[term.name] * weight_at(self.schedules.get(term.name, ((0, 1.0),)), step))
                for term in self.terms
            )
            + self.watched
        )

    def due(self, step: int) -> bool:
        """Whether to measure the terms' gradients before update `step`."""
        return self.balance is not None and self.balance.due(step)

    @property
    def measured_terms(self) -> tuple[Term, ...]:
        """The terms whose gradients `take_in` needs."""
        shares = {} if self.balance is None else self.balance.shares
        return tuple(term for term in self.terms if term.name in shares)

    def take_in(self, norms: Mapping[str, float]) -> Weighting:
        """A copy with a measurement taken in: by term, the norm of its gradient at coefficient 1."""
        assert self.balance is not None, "nothing is balanced"
        return replace(self, balance=self.balance.update(norms))

    def state(self) -> dict[str, Any] | None:
        """Plain numbers, for a checkpoint."""
        return None if self.balance is None else self.balance.state()

    def restored(self, state: Mapping[str, Any] | None) -> Weighting:
        """A copy with the state of a checkpoint."""
        if self.balance is None or state is None:
            return self
        return replace(self, balance=self.balance.restored(state))


def gradient_shares(terms: Sequence[Term], norms: Mapping[str, float]) -> dict[str, float]:
    """By measured term, |coefficient| * norm as a share of their sum; empty if there is no gradient at all."""
    pulls = {term.name: abs(term.coefficient) * norms[term.name] for term in terms if term.name in norms}
    whole = sum(pulls.values())
    return {name: pull / whole for name, pull in pulls.items()} if whole > 0 else {}


def weight_at(points: Sequence[tuple[int, float]], step: int) -> float:
    """Linear interpolation between the points (step, weight); the first weight before them, the last one after.

    ValueError unless there are points, in ascending order of steps.
    """
    if not points or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError(f"weights by step: got {list(points)}, expected (step, weight) in ascending order of steps")
    if step <= points[0][0]:
        return points[0][1]
    for (start, before), (stop, after) in pairwise(points):
        if step < stop:
            # Linear between the two points around the step.
            return before + (after - before) * (step - start) / (stop - start)
    return points[-1][1]


def weighting_of(settings: DistillationSettings | OnPolicySettings) -> Weighting:
    """The terms with their schedules and balance; only terms on the data's text are balanced."""
    balance = _balance(settings) if isinstance(settings, DistillationSettings) else None
    terms = terms_of(settings)
    schedules = {term.name: term.settings.schedule for term in terms if term.settings.schedule is not None}
    return Weighting(terms, schedules, balance)


def weightings(settings: Settings, watched: Sequence[str]) -> dict[Kind, Weighting]:
    """The terms on each kind of batch in the run; on the data's own, with those that the mixture policy needs."""
    data = weighting_of(settings.distillation)
    data = replace(data, watched=watched_terms(watched, settings.distillation.by_name()))
    losses: dict[Kind, Weighting] = {"data": data}
    if settings.on_policy.active:
        losses["rollout"] = weighting_of(settings.on_policy)
    return losses


def _balance(settings: DistillationSettings) -> GradientBalance | None:
    balance: Mapping[str, float] = settings.balance.shares
    if not balance:
        return None
    reference = settings.balance.reference or next(iter(balance))
    return GradientBalance(balance, reference, settings.balance.ema, settings.balance.every)
