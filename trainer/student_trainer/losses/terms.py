"""The interface of a loss to the rest of the trainer: a `Term`, with what it needs from a teacher and how it is
computed.

Made by `kinds` from settings, read by `head`, the students, the loop and target sources. The reduction, the same for
all: a term's value is the sum, over the rows that count for it, of value in nats * weight of the label. The total adds
coefficient * value, and the loop divides once by the global count.

    TokenTerm     on the student's distribution of a token: `head.head_loss` computes all of these together
    CleanTerm     also on the distribution of a token, at the rows of a clean half, which reads from left to right
    StatesTerm    on the states of a forward pass, which the student captures for it
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
    """What losses need from a teacher; `|` combines the needs of two.

    `kinds`: kinds of token targets. `temperatures`: those other than 1 at which probabilities of given ids are needed.
    `sampled_at`: temperatures at which samples are drawn. `layers`: layers whose attention states are needed, as the
    settings name them, each with the dtype in which they are sent.
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
        """The kinds that are requested with the batch."""
        return self.kinds - LATE

    @property
    def late(self) -> frozenset[Kind]:
        """The kinds that are requested when a step begins, since the request depends on the student's weights."""
        return self.kinds & LATE

    @classmethod
    def of(cls, terms: Iterable[Term]) -> Needs:
        return reduce(Needs.__or__, (term.needs for term in terms), cls())


@dataclass(frozen=True)
class Term(ABC):
    """One summand of the loss: its name in the metrics, its settings, and its coefficient at this step."""

    name: str
    settings: TermSettings | AttentionSettings
    coefficient: float

    @property
    def kind(self) -> str:
        return self.settings.kind

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the term needs from a teacher."""


@dataclass(frozen=True)
class TokenTerm(Term):
    """A term of `head_loss`. Without a support it needs no teacher, and its rows are those with a label.

    `squared`: T^2 if the settings say so, else 1.
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
    """A function of the label's logprob only, see `divergences.LABEL_LOSSES`."""

    settings: TermSettings

    @property
    def needs(self) -> Needs:
        return Needs()


@dataclass(frozen=True)
class CleanTerm(Term):
    """Cross-entropy with the view's labels at its `clean_rows_N`. Computed like a TokenTerm, on those rows."""

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
        """Whether both distributions are renormalised over the support."""
        return isinstance(self.settings, DivergenceSettings) and self.settings.tail == "renormalise"

    @property
    def plain(self) -> bool:
        """Whether it is a sum over the support's ids only, whatever mass the rest has."""
        student = SUPPORTS[self.support].student
        truncates = isinstance(self.settings, DivergenceSettings) and self.settings.tail == "truncate"
        return student == "ids" or (truncates and student == "ids and the rest")

    @property
    def needs(self) -> Needs:
        support = SUPPORTS[self.support]
        at = frozenset({self.temperature})
        return Needs(
            kinds=frozenset({support.kind}),
            # At T = 1 the served logprobs are already normalised; sampled ids have their own temperature.
            temperatures=at - {1.0} if support.normalised else frozenset(),
            sampled_at=at if support.drawn else frozenset(),
        )


@dataclass(frozen=True)
class Capture:
    """What the student's forward pass keeps for terms. `attention`: layers, counted from 0, whose query, key and value
    are kept.
    """

    attention: frozenset[int] = frozenset()

    def __or__(self, other: Capture) -> Capture:
        return Capture(self.attention | other.attention)

    @classmethod
    def of(cls, terms: Iterable[Term], config: Any) -> Capture:
        """What these terms need from a model with this transformers `config`."""
        wanted = (term.capture(config) for term in terms if isinstance(term, StatesTerm))
        return reduce(Capture.__or__, wanted, cls())


@dataclass(frozen=True, eq=False)
class Captured:
    """What a forward pass has kept, part of the autograd graph. `hidden_ND`: the final hidden rows [N, D] that predict
    the labels and, if there is a CleanTerm, after them those of the clean half, [2 N, D] in all. `attention`: by layer,
    query [B, T, H, dh] and key [B, T, H_kv, dh], both after RoPE, and value [B, T, H_kv, dh].
    """

    hidden_ND: Tensor
    attention: Mapping[int, QKV]


@dataclass(frozen=True)
class StatesTerm(Term):
    """A term that compares states of a forward pass: the final hidden rows, or others that it has captured."""

    def check_student(self, config: Any) -> None:
        """ValueError if a student with this `config` lacks what the term needs."""

    def check_teacher(self, widths: Mapping[str, int]) -> None:
        """ValueError if the teacher's states do not fit. `widths`: of their query, key and value."""

    def capture(self, config: Any) -> Capture:
        """What to keep of the student's forward pass besides the final hidden rows."""
        return Capture()

    @abstractmethod
    def values(self, captured: Captured, micro: MicroBatch, config: Any) -> Tensor:
        """[N] float32, differentiable: the value of each label, without coefficient and weight."""
