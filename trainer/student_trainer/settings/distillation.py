"""The loss: the section `distillation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from student_trainer.settings.attention import AttentionSettings
from student_trainer.settings.section import Positive, Section
from student_trainer.settings.terms import CrossEntropySettings, Named, TermOfKind, Terms
from teacher_proto.requests import HiddenDtype

ATTENTION = "attention"  # the name of the relation term


class BalanceSettings(Section):
    """Shares of the gradient norm in place of coefficients; see `losses.balance`."""

    shares: dict[str, Positive] = Field(
        default_factory=dict,
        description="gradient norm that each term should have, relative to the others, by name; the coefficients are "
        "adapted to it; empty: fixed coefficients",
    )
    reference: str | None = Field(
        None, description="the term whose coefficient is not adapted; null: the first of balance.shares"
    )
    every: int = Field(50, ge=1, description="steps between measurements of the gradient norms")
    ema: float = Field(0.9, ge=0, lt=1, description="decay of the running mean of the norms, per measurement")


class LookaheadSettings(Section):
    """Targets of masked tokens that take the following tokens into account; see `targets.lookahead`."""

    window: int | None = Field(
        None,
        ge=1,
        description="block-diffusion students: how many of the following tokens the teacher takes into account when "
        "a masked token is scored; null: none (the usual next-token distribution)",
    )
    candidates: int = Field(
        8, ge=1, description="number of the teacher's most likely ids that are scored with the following tokens"
    )
    positions: int | None = Field(
        16, ge=1, description="tokens per row that are scored this way, picked at random; null: all"
    )
    student_best: bool = Field(
        True,
        description="include the student's most likely id among the candidates; costs a forward pass of the student",
    )


class DistillationSettings(Section):
    """The loss: its terms by name, and the relation term.

    `lambda_logits`, `gamma_attention` and `temperature` are shorthands: the presets' terms refer to them by Hydra's
    interpolation. Only the terms' own fields are computed with.
    """

    lambda_logits: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="shorthand that the presets read: coefficient of the loss on the teacher's logits",
    )
    gamma_attention: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="shorthand that the presets read: coefficient of the attention loss",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="shorthand that the presets read: temperature of the loss on the teacher's logits",
    )
    terms: Terms = Field(
        default_factory=lambda: Named(cross_entropy=CrossEntropySettings()),
        description="the losses, by name; their weighted sum is minimised",
    )
    attention: AttentionSettings = AttentionSettings()
    balance: BalanceSettings = BalanceSettings()
    lookahead: LookaheadSettings = LookaheadSettings()
    chunk_rows: int | None = Field(
        None,
        ge=1,
        description="positions whose logits are in memory at a time; null: chosen by device and vocabulary size",
    )
    samples: int = Field(50, ge=1, description="kind sampled: ids drawn from the teacher per position")
    sample_seed: int = Field(
        0, ge=0, le=2**63 - 1, description="kind sampled: seed of the draws, which also depend on the sequence itself"
    )
    gather_k: int = Field(
        64, ge=1, description="support gather: number of the student's most likely ids that the teacher scores"
    )
    gather_at: Literal["student", "labels"] = Field(
        "student",
        description="support gather: ids that the teacher scores; student: the student's gather_k most likely; "
        "labels: the tokens of the class labels",
    )
    hidden_dtype: HiddenDtype = Field(
        "float16",
        description="support full, kind final_hidden: number format in which the teacher's hidden states are sent",
    )

    @model_validator(mode="after")
    def _balanced_terms_are_there(self) -> DistillationSettings:
        shares, reference = self.balance.shares, self.balance.reference
        known = self.terms.keys() | ({ATTENTION} if self.attention.active else set())
        if missing := sorted(shares.keys() - known):
            raise ValueError(f"balance.shares names {missing[0]}, expected one of the terms {sorted(known)}")
        if shares and reference is not None and reference not in shares:
            raise ValueError(f"balance.reference is {reference}, expected one of balance.shares: {sorted(shares)}")
        return self

    def by_name(self) -> dict[str, TermOfKind | AttentionSettings]:
        """All terms by name, the relation term last. ValueError if there are none, or two of one name."""
        if not self.terms:
            raise ValueError("distillation.terms is empty: name at least one loss")
        if not self.attention.active:
            return {**self.terms}
        if ATTENTION in self.terms:
            raise ValueError(
                "distillation.terms.attention: that name is reserved for the relation term, choose another"
            )
        return {**self.terms, ATTENTION: self.attention}
