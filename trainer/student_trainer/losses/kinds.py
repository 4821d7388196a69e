"""The class of each kind of loss, and terms made from settings. Called by `build`, `evaluator` and target sources.

The settings of a kind are in `settings.terms`; a token loss has its formula in `divergences`, any other its own class.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from student_trainer.losses.attention_term import AttentionTerm
from student_trainer.losses.divergences import DIVERGENCES, LABEL_LOSSES
from student_trainer.losses.hidden_term import FinalHiddenTerm
from student_trainer.losses.terms import CleanTerm, LabelTerm, TeacherTerm, Term, TokenTerm
from student_trainer.settings import DistillationSettings, OnPolicySettings, Settings
from student_trainer.settings.attention import AttentionSettings
from student_trainer.settings.terms import Named, Terms, TermSettings

TERMS: dict[str, type[Term]] = {
    **dict.fromkeys(LABEL_LOSSES, LabelTerm),
    **dict.fromkeys(DIVERGENCES, TeacherTerm),
    "autoregressive": CleanTerm,
    "attention_relations": AttentionTerm,
    "final_hidden": FinalHiddenTerm,
}
_CHECKED: TypeAdapter[Named] = TypeAdapter(Terms)


def term_of(name: str, settings: TermSettings | AttentionSettings) -> Term:
    """The term that these settings describe."""
    assert settings.coefficient is not None, "a term that is switched off is not made"
    return TERMS[settings.kind](name, settings, settings.coefficient)


def token_term(name: str, kind: str, coefficient: float = 1.0, **settings: Any) -> TokenTerm:
    """A token loss from its settings, for losses written in code. ValueError for invalid settings."""
    given = {"kind": kind, "coefficient": coefficient, **settings}
    term = term_of(name, _CHECKED.validate_python({name: given})[name])
    assert isinstance(term, TokenTerm), kind
    return term


def terms_of(settings: DistillationSettings | OnPolicySettings) -> tuple[Term, ...]:
    """The terms in the order of the settings. ValueError if there are none, or two of one name."""
    return tuple(term_of(name, each) for name, each in settings.by_name().items())


def all_terms(settings: Settings) -> tuple[Term, ...]:
    """Every loss of the run, including those on the student's own text."""
    on_policy = settings.on_policy
    return terms_of(settings.distillation) + (terms_of(on_policy) if on_policy.active else ())
