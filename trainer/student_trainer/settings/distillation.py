"""The loss: the section `distillation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from student_trainer.settings.attention import AttentionSettings
from student_trainer.settings.section import Positive, Section
from student_trainer.settings.terms import CrossEntropySettings, Named, TermOfKind, Terms
from teacher_proto.requests import HiddenDtype

ATTENTION = "attention"  # the relation term's name among the others'


class BalanceSettings(Section):
    """Shares of the gradient instead of coefficients; see `losses.balance`."""

    shares: dict[str, Positive] = Field(
        default_factory=dict, description="by term, how hard it pulls relative to the others; empty: no balancing"
    )
    reference: str | None = Field(None, description="the term that keeps its coefficient; null: the first of shares")
    every: int = Field(50, ge=1, description="steps from one measurement of the gradients to the next")
    ema: float = Field(0.9, ge=0, lt=1, description="what is kept of the running mean at a measurement")


class LookaheadSettings(Section):
    """Of block-diffusion students: a masked token's distribution by what follows too; see `targets.lookahead`."""

    window: int | None = Field(
        None, ge=1, description="following tokens that are scored; null: the teacher's causal row"
    )
    candidates: int = Field(8, ge=1, description="the teacher's likeliest ids that are tried in the token's place")
    positions: int | None = Field(16, ge=1, description="tokens of a row that are looked ahead of; null: all")
    student_best: bool = Field(True, description="try the student's likeliest id too, for one more forward pass")


class DistillationSettings(Section):
    """The loss: its terms by name, and the relation term.

    `lambda_logits`, `gamma_attention` and `temperature` are names by which the presets set fields of their terms, by
    Hydra's interpolation; the terms hold what is computed.
    """

    lambda_logits: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="in presets: coefficient of the loss on the teacher's logits"
    )
    gamma_attention: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="in presets: coefficient of the attention relations"
    )
    temperature: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="in presets: temperature of the loss on the teacher's logits"
    )
    terms: Terms = Field(default_factory=lambda: Named(cross_entropy=CrossEntropySettings()))
    attention: AttentionSettings = AttentionSettings()
    balance: BalanceSettings = BalanceSettings()
    lookahead: LookaheadSettings = LookaheadSettings()
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

    def by_name(self) -> dict[str, TermOfKind | AttentionSettings]:
        """Every term; the relation term comes last. ValueError where there are none, or two of one name."""
        if not self.terms:
            raise ValueError("distillation.terms is empty: name at least one loss")
        if not self.attention.active:
            return {**self.terms}
        if ATTENTION in self.terms:
            raise ValueError("distillation.terms.attention: that name is the relation term's, give it another")
        return {**self.terms, ATTENTION: self.attention}
