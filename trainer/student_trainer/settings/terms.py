"""The settings of each loss: one class per kind. Read by `distillation` and `on_policy`; `losses` computes them.

`kind` selects the class, or else the loss's name does. A setting that only other kinds have is refused, and the message
lists them. Attention relations have their own section, see `settings.attention`.

A new kind is a class here and an entry in `TermOfKind`; its computation is in `losses.divergences`, or in its own file,
named in `losses.kinds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from student_trainer.settings.section import Schedule, Section

Coefficient = Annotated[float, Field(allow_inf_nan=False)]
Between0And1 = Annotated[float, Field(gt=0, lt=1)]


class TermSettings(Section):
    """Settings of every kind. The sum over tokens is multiplied by coefficient and schedule, divided by their count."""

    needs_teacher: ClassVar[bool] = True

    kind: str
    coefficient: Coefficient = Field(
        1.0, description="weight of this loss in the sum; the loss itself is a mean over the tokens that it applies to"
    )
    schedule: Schedule = Field(
        None,
        description="multiply the coefficient by a piecewise linear function of the step, given as [[step, factor], "
        "...]; null: constant",
    )

    def without_effect(self) -> list[str]:
        """Names of the settings that differ from their default but have no effect, given the others."""
        return []


class CrossEntropySettings(TermSettings):
    """Cross-entropy with the data's next token."""

    needs_teacher: ClassVar[bool] = False

    kind: Literal["cross_entropy"] = Field(
        "cross_entropy", description="kind of loss; may be left out if the term's name is a kind"
    )


class AutoregressiveSettings(TermSettings):
    """Cross-entropy with each masked token, which a block-diffusion student's clean half predicts autoregressively."""

    needs_teacher: ClassVar[bool] = False

    kind: Literal["autoregressive"] = "autoregressive"


class TemperedSettings(TermSettings):
    """Settings of kinds that compare student and teacher at a temperature."""

    temperature: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="temperature T at which both the teacher's and the student's distributions are taken",
    )
    temperature_squared: bool = Field(
        False, description="multiply the loss by T^2, so that gradients do not shrink with T (Hinton et al.)"
    )

    def without_effect(self) -> list[str]:
        return ["temperature_squared"] if self.temperature_squared and self.temperature == 1.0 else []


class SampledSettings(TemperedSettings):
    """Cross-entropy with ids drawn from the teacher at `temperature` (RS-KD, arXiv 2503.16870)."""

    kind: Literal["sampled"] = "sampled"
    support: Literal["sampled"] = "sampled"

    @field_validator("support", mode="before")
    @classmethod
    def _as_it_was_written(cls, support: Any) -> Any:
        """Settings of earlier runs have top_k here, which was once the default of every kind."""
        return "sampled" if support == "top_k" else support


class DivergenceSettings(TemperedSettings):
    """Settings of divergences between the teacher's and the student's distribution.

    `support`: ids whose teacher probabilities are known; "full" needs the teacher's hidden states and head.
    `tail`: "bucket" compares the mass outside the support as one bucket, which limits the student's mass there;
    "renormalise" compares the distributions conditioned on the support; "truncate" leaves the rest out of the sum of
    KL(teacher‖student), as OPDLM does, so that it is no longer a divergence.
    """

    support: Literal["top_k", "gather", "full"] = Field(
        "top_k",
        description="tokens over which the divergence is taken: top_k: the teacher's top K; gather: the student's "
        "top K; full: the whole vocabulary",
    )
    tail: Literal["bucket", "renormalise", "truncate"] = Field(
        "bucket",
        description="probability mass outside the support; bucket: one extra class on both sides; renormalise: both "
        "distributions are renormalised to the support; truncate: left out (forward_kl, top_k_kl and "
        "tcs only)",
    )

    @model_validator(mode="after")
    def _truncates_only_forward(self) -> DivergenceSettings:
        if self.tail == "truncate" and self.kind not in ("forward_kl", "top_k_kl", "tcs"):
            raise ValueError(
                f"tail is truncate, which only works with KL(teacher‖student) (forward_kl, top_k_kl, tcs), not "
                f"{self.kind}: use bucket or renormalise"
            )
        return self

    def without_effect(self) -> list[str]:
        unused = ["tail"] if self.support == "full" and self.tail != "bucket" else []
        return [*unused, *super().without_effect()]


class ForwardKLSettings(DivergenceSettings):
    kind: Literal["forward_kl"] = "forward_kl"


class TopKKLSettings(DivergenceSettings):
    """forward_kl on the served top K, under its familiar name."""

    kind: Literal["top_k_kl"] = "top_k_kl"
    support: Literal["top_k"] = "top_k"


class TCSSettings(DivergenceSettings):
    """Target concrete scores at masked tokens (TCSM, arXiv 2504.16431), from the teacher's causal rows: forward_kl on
    the served top K, for students that fill in masked tokens. `tail` "renormalise" is the published form.
    """

    kind: Literal["tcs"] = "tcs"
    support: Literal["top_k"] = "top_k"


class ReverseKLSettings(DivergenceSettings):
    kind: Literal["reverse_kl"] = "reverse_kl"


class JSDSettings(DivergenceSettings):
    kind: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, description="jsd: weight of the teacher in the mixture, between 0 and 1 (exclusive)")

    @field_validator("beta")
    @classmethod
    def _between_the_limits(cls, beta: float) -> float:
        if not 0.0 < beta < 1.0:
            raise ValueError(
                f"got beta {beta}, expected a number between 0 and 1; "
                "for the limits, use the kinds forward_kl (0) and reverse_kl (1)"
            )
        return beta


class SkewedKLSettings(DivergenceSettings):
    kind: Literal["skewed_kl"] = "skewed_kl"
    alpha: Between0And1 = Field(
        0.1,
        description="skewed_kl, skewed_reverse_kl: share of the first distribution in the mixture that replaces "
        "the second",
    )


class SkewedReverseKLSettings(DivergenceSettings):
    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    alpha: Between0And1 = Field(
        0.1,
        description="skewed_kl, skewed_reverse_kl: share of the first distribution in the mixture that replaces "
        "the second",
    )


class TVDSettings(DivergenceSettings):
    kind: Literal["tvd"] = "tvd"


class FinalHiddenSettings(TermSettings):
    """Distance to the teacher's final hidden states: |s - t|^2 / |t|^2 of each row, both after the last norm. The
    teacher must have the student's width, as the model does that the student was quantised from.
    """

    kind: Literal["final_hidden"] = "final_hidden"


TermOfKind = (
    CrossEntropySettings
    | AutoregressiveSettings
    | ForwardKLSettings
    | TopKKLSettings
    | TCSSettings
    | ReverseKLSettings
    | JSDSettings
    | SkewedKLSettings
    | SkewedReverseKLSettings
    | TVDSettings
    | SampledSettings
    | FinalHiddenSettings
)
KINDS: dict[str, type[TermSettings]] = {each.model_fields["kind"].default: each for each in get_args(TermOfKind)}


def with_kinds(terms: Any) -> Any:
    """The terms by name, each with its `kind` filled in. ValueError for an unknown kind, and for a setting that only
    other kinds have.
    """
    if not isinstance(terms, Mapping):
        return terms
    return {name: _with_kind(name, given) if isinstance(given, Mapping) else given for name, given in terms.items()}


def _with_kind(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    kind = given.get("kind") or name
    if kind == "attention_relations":
        raise ValueError(f"{name}: attention relations are set under distillation.attention")
    if kind not in KINDS:
        raise ValueError(f"loss '{name}': got kind '{kind}', expected one of {sorted(KINDS)}")
    for field in given.keys() - KINDS[kind].model_fields.keys():
        if having := [other for other, settings in KINDS.items() if field in settings.model_fields]:
            raise ValueError(
                f"{name}.{field} is not a setting of kind {kind}, only of {', '.join(having)}: leave it out, or give "
                "the loss another kind"
            )
    return {**given, "kind": kind}


Named = dict[str, TermOfKind]
Terms = Annotated[dict[str, Annotated[TermOfKind, Field(discriminator="kind")]], BeforeValidator(with_kinds)]


def as_written_now(terms: Mapping[str, Any]) -> dict[str, Any]:
    """The terms of an earlier run, each of which had the settings of all kinds, reduced to the settings of its kind."""
    now = {}
    for name, given in terms.items():
        settings = KINDS.get(given.get("kind") or name)
        if settings is None:  # of another trainer: kept as it is, so that it differs
            now[name] = dict(given)
            continue
        own = {field: value for field, value in given.items() if field in settings.model_fields and field != "kind"}
        now[name] = settings.model_validate(own).model_dump(mode="json")
    return now
