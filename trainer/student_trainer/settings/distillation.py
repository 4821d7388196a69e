"""The loss: the section `distillation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from student_trainer.settings.attention import AttentionSettings
from student_trainer.settings.section import Positive, Schedule, Section
from teacher_proto.requests import HiddenDtype

if TYPE_CHECKING:
    from student_trainer.losses.terms import Term
    from student_trainer.losses.weighting import Weighting

ATTENTION = "attention"  # the relation term's name among the others'


class TermSettings(Section):
    """One summand of the loss; see `losses.terms.Term` for the exact meaning of each field."""

    kind: str | None = Field(None, description="which loss; null: the term's name")
    coefficient: float = 1.0
    temperature: float = 1.0
    tail: Literal["bucket", "renormalise"] = "bucket"
    temperature_squared: bool = Field(False, description="multiply by the temperature squared")
    beta: float = 0.5
    alpha: float = 0.1
    support: Literal["top_k", "gather", "sampled", "full"] = "top_k"
    schedule: Schedule = Field(
        None, description="points [step, factor] of the coefficient, straight lines between them; null: 1 throughout"
    )

    def term(self, name: str) -> Term:
        """The term that the losses read. ValueError for one that cannot be."""
        from student_trainer.losses.terms import Term  # brings torch

        if (self.kind or name) == "attention_relations":
            raise ValueError(f"distillation.terms.{name}: attention relations are set under distillation.attention")
        return Term(name=name, kind=self.kind or name, **self.model_dump(exclude={"kind", "schedule"}))


class BalanceSettings(Section):
    """Shares of the gradient instead of coefficients; see `losses.balance`."""

    shares: dict[str, Positive] = Field(
        default_factory=dict, description="by term, how hard it pulls relative to the others; empty: no balancing"
    )
    reference: str | None = Field(None, description="the term that keeps its coefficient; null: the first of shares")
    every: int = Field(50, ge=1, description="steps from one measurement of the gradients to the next")
    ema: float = Field(0.9, ge=0, lt=1, description="what is kept of the running mean at a measurement")


class DistillationSettings(Section):
    """The loss: its terms by name, and the relation term."""

    terms: dict[str, TermSettings] = Field(default_factory=lambda: {"cross_entropy": TermSettings()})
    attention: AttentionSettings = AttentionSettings()
    balance: BalanceSettings = BalanceSettings()
    chunk_rows: int | None = Field(None, ge=1, description="rows whose logits exist at a time; null: by memory")
    samples: int = Field(50, ge=1, description="draws a token, for losses on sampled targets")
    sample_seed: int = Field(0, ge=0, le=2**63 - 1, description="with a document's tokens it decides what is drawn")
    gather_k: int = Field(64, ge=1, description="the student's own likeliest ids that support gather asks about")
    gather_at: Literal["student", "labels"] = Field(
        "student", description="what support gather asks about: the student's likeliest ids, or the words of classes"
    )
    hidden_dtype: HiddenDtype = Field("float16", description="of the hidden states that support full asks for")

    @model_validator(mode="after")
    def _balanced_terms_are_there(self) -> DistillationSettings:
        shares, reference = self.balance.shares, self.balance.reference
        known = self.terms.keys() | ({ATTENTION} if self.attention.active else set())
        if missing := sorted(shares.keys() - known):
            raise ValueError(f"balance.shares names {missing[0]}, expected one of the terms {sorted(known)}")
        if shares and reference is not None and reference not in shares:
            raise ValueError(f"balance.reference is {reference}, expected one of balance.shares: {sorted(shares)}")
        return self

    def weighting(self) -> Weighting:
        """The terms with what changes their coefficients."""
        from student_trainer.losses.balance import GradientBalance  # brings torch
        from student_trainer.losses.weighting import Weighting

        shares, balance = self.balance.shares, None
        if shares:
            reference = self.balance.reference or next(iter(shares))
            balance = GradientBalance(shares, reference, self.balance.ema, self.balance.every)
        schedules = {name: term.schedule for name, term in self.terms.items() if term.schedule is not None}
        if self.attention.schedule is not None:
            schedules[ATTENTION] = self.attention.schedule
        return Weighting(self.build(), schedules, balance)

    def build(self) -> tuple[Term, ...]:
        """The terms in the order of their names in the settings. ValueError for one that cannot be."""
        if not self.terms:
            raise ValueError("distillation.terms is empty: name at least one loss")
        terms = tuple(settings.term(name) for name, settings in self.terms.items())
        return (*terms, *self._attention_term())

    def _attention_term(self) -> tuple[Term, ...]:
        from student_trainer.losses.terms import Term  # brings torch

        if self.attention.coefficient is None:
            return ()
        if ATTENTION in self.terms:
            raise ValueError("distillation.terms.attention: that name is the relation term's, give it another")
        return (Term(ATTENTION, "attention_relations", self.attention.coefficient),)
