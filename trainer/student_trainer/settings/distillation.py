"""The loss: the section `distillation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from student_trainer.settings.section import Section
from teacher_proto.requests import HiddenDtype

if TYPE_CHECKING:
    from student_trainer.losses.terms import Term


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

    def term(self, name: str) -> Term:
        """The term that the losses read. ValueError for one that cannot be."""
        from student_trainer.losses.terms import Term  # brings torch

        return Term(name=name, kind=self.kind or name, **self.model_dump(exclude={"kind"}))


class DistillationSettings(Section):
    """The loss: its terms by name."""

    terms: dict[str, TermSettings] = Field(default_factory=lambda: {"cross_entropy": TermSettings()})
    chunk_rows: int | None = Field(None, ge=1, description="rows whose logits exist at a time; null: by memory")
    samples: int = Field(50, ge=1, description="draws a token, for losses on sampled targets")
    sample_seed: int = Field(0, ge=0, le=2**63 - 1, description="with a document's tokens it decides what is drawn")
    gather_k: int = Field(64, ge=1, description="the student's own likeliest ids that support gather asks about")
    hidden_dtype: HiddenDtype = Field("float16", description="of the hidden states that support full asks for")

    def build(self) -> tuple[Term, ...]:
        """The terms in the order of their names in the settings. ValueError for one that cannot be."""
        if not self.terms:
            raise ValueError("distillation.terms is empty: name at least one loss")
        return tuple(settings.term(name) for name, settings in self.terms.items())
