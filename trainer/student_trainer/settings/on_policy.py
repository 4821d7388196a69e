"""Batches that the student writes itself: the section `on_policy`."""

from __future__ import annotations

from pydantic import Field, model_validator

from student_trainer.settings.section import Positive, Section, Share
from student_trainer.settings.terms import Named, ReverseKLSettings, TermOfKind, Terms


class OnPolicySettings(Section):
    """A share of the batches consists of the student's own text, scored by the teacher (GKD, arXiv 2306.13649)."""

    share: Share = Field(0.0, description="share of the batches written by the student itself (lambda in GKD); 0: none")
    lag: int = Field(1, ge=0, description="staleness: updates between writing a batch and training on it")
    prompt_tokens: int = Field(
        32, ge=1, description="prompt length in tokens, for text; of a chat, the prompt is all that precedes the answer"
    )
    new_tokens: int = Field(128, ge=1, description="maximum number of tokens generated per prompt")
    temperature: Positive = Field(1.0, description="temperature of the student's sampling")
    sequences_at_once: int | None = Field(
        None, ge=1, description="sequences generated in parallel; null: the whole batch"
    )
    terms: Terms = Field(
        default_factory=lambda: Named(reverse_kl=ReverseKLSettings()),
        description="the losses on these batches, in place of distillation.terms",
    )

    @property
    def active(self) -> bool:
        return self.share > 0

    @model_validator(mode="after")
    def _teaches(self) -> OnPolicySettings:
        if not self.terms:
            raise ValueError("on_policy.terms is empty: name at least one loss, such as reverse_kl or jsd")
        if own := [term.kind for term in self.terms.values() if not term.needs_teacher]:
            raise ValueError(
                f"on_policy.terms has a {own[0]}: on the student's own text, this loss only teaches it to repeat "
                "itself; use reverse_kl or jsd"
            )
        return self

    def by_name(self) -> dict[str, TermOfKind]:
        """The terms as `on_policy_NAME`, so that their metrics are kept apart from those on the data."""
        return {f"on_policy_{name}": settings for name, settings in self.terms.items()}
