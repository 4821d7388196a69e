"""What a loss is to the rest of the trainer: a `Term`, with what it needs of a teacher and how it is computed.

Made by `kinds` out of settings, read by `head`, the students, the loop and whoever asks a teacher. The reduction, once
for all: a term's value is a sum over the rows that count for it, of value in nats * weight of the label. The total adds
coefficient * value, and the loop divides once by the global count.

    TokenTerm     of the student's distribution of a token: computed by `head.head_loss` with all others together
    CleanTerm     of a token's distribution too, by the rows of a clean half, which reads from left to right
    StatesTerm    of the states of a forward pass, which the student captures for it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import Tensor

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.losses.supports import SUPPORTS
from student_trainer.settings.attention import AttentionSettings, Layer
from student_trainer.settings.terms import DivergenceSettings, SampledSettings, TermSettings
from teacher_proto.compute.relations import QKV
from teacher_proto.requests import Kind

LATE = frozenset(support.kind for support in SUPPORTS.values() if not support.ahead)


@dataclass(frozen=True)
class Needs:
    """What losses need of a teacher; `|` is what two need together.

    `kinds`: of targets, those about tokens. `temperatures`: other than 1, at which probabilities on given ids are
    needed. `sampled_at`: temperatures at which samples are drawn. `layers`: layers whose attention states are
    needed, as the settings name them, each with the dtype in which they travel.
    """

    kinds: frozenset[Kind] = frozenset()
    temperatures: frozenset[float] = frozenset()
    sampled_at: frozenset[float] = frozenset()
    layers: frozenset[tuple[Layer, str]] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.kinds | other.kinds,
            self.temperatures | other.temperatures,
            self.sampled_at | other.sampled_at,
            self.layers | other.layers,
        )

    @property
    def ahead(self) -> frozenset[Kind]:
        """The kinds that are asked for with the batch."""
        return self.kinds - LATE

    @property
    def late(self) -> frozenset[Kind]:
        """The kinds that are asked for when a step begins: what is asked comes out of the student's weights."""
        return self.kinds & LATE

    @classmethod
    def of(cls, terms: Iterable[Term]) -> Needs:
        return reduce(Needs.__or__, (term.needs for term in terms), cls())


@dataclass(frozen=True)
class Term(ABC):
    """One summand of the loss: its name among the metrics, its settings, and its coefficient at this step."""

    name: str
    settings: TermSettings | AttentionSettings
    coefficient: float

    @property
    def kind(self) -> str:
        return self.settings.kind

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it needs of a teacher."""


@dataclass(frozen=True)
class TokenTerm(Term):
    """A term of `head_loss`. Without a support it reads nothing of a teacher, and its rows are those with a label.

    `squared`: T^2 where the settings ask for it, else 1.
    """

    @property
    def temperature(self) -> float:
        return 1.0

    @property
    def support(self) -> str | None:
        return None

    @property
    def squared(self) -> float:
        return 1.0


@dataclass(frozen=True)
class LabelTerm(TokenTerm):
    """A function of the label's logprob alone, see `divergences.LABEL_LOSSES`."""

    settings: TermSettings

    @property
    def needs(self) -> Needs:
        return Needs()


@dataclass(frozen=True)
class CleanTerm(Term):
    """Cross-entropy with each of the view's labels at its `clean_rows_N`. Computed as a TokenTerm is, of those rows."""

    @property
    def needs(self) -> Needs:
        return Needs()


@dataclass(frozen=True)
class TeacherTerm(TokenTerm):
    """A comparison with the teacher's distribution on a support, see `divergences.DIVERGENCES`."""

    settings: DivergenceSettings | SampledSettings

    @property
    def temperature(self) -> float:
        return self.settings.temperature

    @property
    def support(self) -> str:
        return self.settings.support

    @property
    def squared(self) -> float:
        return self.temperature**2 if self.settings.temperature_squared else 1.0

    @property
    def renormalises(self) -> bool:
        """Whether the two are compared given that the token is in the support."""
        return isinstance(self.settings, DivergenceSettings) and self.settings.tail == "renormalise"

    @property
    def plain(self) -> bool:
        """Whether it is a sum over the ids of the support alone, whatever mass is on the rest."""
        student = SUPPORTS[self.support].student
        truncates = isinstance(self.settings, DivergenceSettings) and self.settings.tail == "truncate"
        return student == "ids" or (truncates and student == "ids and the rest")

    @property
    def needs(self) -> Needs:
        support = SUPPORTS[self.support]
        at = frozenset({self.temperature})
        return Needs(
            kinds=frozenset({support.kind}),
            # At T = 1 the served logprobs are normalised as they are; sampled ids carry their own temperature.
            temperatures=at - {1.0} if support.normalised else frozenset(),
            sampled_at=at if support.drawn else frozenset(),
        )


@dataclass(frozen=True)
class Capture:
    """What a forward pass of the student keeps for terms: layers, from 0, whose query, key and value are kept."""

    attention: frozenset[int] = frozenset()

    def __or__(self, other: Capture) -> Capture:
        return Capture(self.attention | other.attention)

    @classmethod
    def of(cls, terms: Iterable[Term], config: Any) -> Capture:
        """What these terms want of a model with `config`, transformers' own record of its shape."""
        wanted = (term.capture(config) for term in terms if isinstance(term, StatesTerm))
        return reduce(Capture.__or__, wanted, cls())


@dataclass(frozen=True, eq=False)
class Captured:
    """What a forward pass has kept, part of the autograd graph: the final hidden rows [N, D] that predict the labels,
    and behind them, where a CleanTerm wants them, those of the clean half, [2 N, D] in all;
    by layer the query [B, T, H, dh] after RoPE, key and value [B, T, H_kv, dh].
    """

    hidden_ND: Tensor
    attention: Mapping[int, QKV]


@dataclass(frozen=True)
class StatesTerm(Term):
    """A term that compares states of a forward pass: the final hidden rows, or what else it wants captured."""

    def check_student(self, config: Any) -> None:
        """ValueError where a student with this `config` has not what the term needs."""

    def check_teacher(self, widths: Mapping[str, int]) -> None:
        """ValueError where the states of the layers that it needs, whose query, key and value are so wide, won't do."""

    def capture(self, config: Any) -> Capture:
        """What it wants kept of the student's forward pass beside the final hidden rows."""
        return Capture()

    @abstractmethod
    def values(self, captured: Captured, micro: MicroBatch, config: Any) -> Tensor:
        """[N] float32, differentiable: its value for each label, without coefficient and weight."""
