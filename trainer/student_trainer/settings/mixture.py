"""How the sources' weights change during a run: the settings under `data.mixture`, one class per policy.

Read by `data.policies`. `policy` selects the class; a setting that only other policies have is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from student_trainer.settings.section import Names, Positive, Share


class MixtureSettings(BaseModel):
    """Settings that every mixture policy has; see `data.policies`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    lag: int = Field(
        32, ge=1, description="updates between what a policy observes and the first batch drawn with its new weights"
    )

    needs_teacher: ClassVar[bool] = False

    @property
    def named_sources(self) -> tuple[str, ...]:
        """The sources that the settings name, which must exist."""
        return ()


class StaticMixture(MixtureSettings):
    """The configured weights, throughout the run."""

    policy: Literal["static"] = Field(
        "static",
        description="how source weights change: static: not at all; excess, divergence: towards sources where the "
        "student is far behind the teacher; ado: by scaling laws; influence: by gradients",
    )


class AdaptiveMixture(MixtureSettings):
    """Settings of all policies that change the weights. `floor` and `cap` bound the result of every decision."""

    update_interval: int = Field(1000, ge=1, description="updates between changes of the weights")
    floor: Share = Field(0.05, description="smallest weight of a source, as a fraction of its configured weight")
    cap: Positive = Field(
        0.8,
        le=1,
        description="largest weight of a source (all weights sum to 1), unless its configured weight is larger",
    )


class GapMixture(AdaptiveMixture):
    """Settings of policies that favour sources on which the student is far behind its teacher."""

    needs_teacher: ClassVar[bool] = True

    form: Literal["bounded", "exponentiated"] = Field(
        "bounded",
        description="excess, divergence: bounded: DDK's update, smoothed towards uniform; exponentiated: DoReMi's, "
        "which may collapse onto one source",
    )
    kept: Share = Field(
        0.5,
        description="excess, divergence with form bounded: share of DDK's update in the new weights, the rest being "
        "uniform; influence: share of the previous weights in the new ones (default 0.9)",
    )
    start: Literal["prior", "measured"] = Field(
        "prior",
        description="form bounded: the first update starts from the configured weights (prior), or from the "
        "measured gaps alone (measured)",
    )
    eta: Positive = Field(
        1.0, description="step size: multiplies the score in the exponent of the update (default 5 for influence)"
    )
    smoothing: Share = Field(
        1e-3, description="form exponentiated: share of the uniform distribution mixed into the new weights"
    )
    over: Names = Field((), description="sources whose weights may change; the others keep theirs; empty: all")

    @property
    def named_sources(self) -> tuple[str, ...]:
        return self.over


class ExcessMixture(GapMixture):
    """By the student's cross-entropy minus the teacher's."""

    policy: Literal["excess"] = "excess"


class DivergenceMixture(GapMixture):
    """By KL(teacher‖student)."""

    policy: Literal["divergence"] = "divergence"


class AdoMixture(AdaptiveMixture):
    """By a scaling law of each source's loss; it needs no teacher."""

    policy: Literal["ado"] = "ado"


class InfluenceMixture(AdaptiveMixture):
    """By how well a source's gradient aligns with the probe's."""

    policy: Literal["influence"] = "influence"
    probe: Names = Field(
        (),
        description="policy influence: sources whose held-out rows define the target; give a source weight 0 to use "
        "it as a probe only; empty: all",
    )
    score: Literal["cosine", "doge", "dot"] = Field(
        "cosine",
        description="policy influence: similarity of a source's mean gradient with the probe's; cosine; doge: "
        "DoGE's clipped product; dot: DGA's inner product",
    )
    eta: Positive = Field(
        5.0, description="step size: multiplies the score in the exponent of the update (default 5 for influence)"
    )
    kept: Share = Field(
        0.9,
        description="excess, divergence with form bounded: share of DDK's update in the new weights, the rest being "
        "uniform; influence: share of the previous weights in the new ones (default 0.9)",
    )
    most_change: Positive = Field(
        0.2, le=1, description="policy influence: largest relative change of a weight per update"
    )
    worse_by: float = Field(
        0.01,
        ge=0,
        description="policy influence: relative rise of the probe's loss at which the configured weights are restored",
    )
    precondition: bool = Field(
        False, description="policy influence: divide the sources' gradients by the root of Adam's second moments"
    )
    sketch_size: int = Field(
        4096, ge=16, description="policy influence: dimension that gradients are projected to, a power of two"
    )
    sketch_steps: int = Field(
        4, ge=1, description="policy influence: updates before each decision whose gradients are used"
    )
    modules: Names = Field(
        ("down_proj",), description="policy influence: modules whose gradients are used, by the end of their names"
    )
    module_count: int = Field(
        4,
        ge=1,
        description="policy influence: how many of those modules, spread evenly over the last third of the layers",
    )

    @property
    def named_sources(self) -> tuple[str, ...]:
        return self.probe

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sketch_size & (self.sketch_size - 1):
            raise ValueError(f"sketch_size is {self.sketch_size}, expected a power of two, such as 4096")
        if self.sketch_steps > self.update_interval:
            raise ValueError(
                f"sketch_steps is {self.sketch_steps}, but there are only {self.update_interval} updates between two "
                "decisions (update_interval)"
            )
        return self


MixtureOfPolicy = StaticMixture | ExcessMixture | DivergenceMixture | AdoMixture | InfluenceMixture
MIXTURES: dict[str, type[MixtureSettings]] = {
    each.model_fields["policy"].default: each for each in get_args(MixtureOfPolicy)
}


def with_policy(given: Any) -> Any:
    """The settings with `policy` filled in. ValueError for an unknown policy, and for a setting that only other
    policies have.
    """
    if not isinstance(given, dict):
        return given
    policy = given.get("policy", "static")
    if policy not in MIXTURES:
        raise ValueError(f"policy: got '{policy}', expected one of {', '.join(MIXTURES)}")
    for field in given.keys() - MIXTURES[policy].model_fields.keys():
        if having := [other for other, settings in MIXTURES.items() if field in settings.model_fields]:
            raise ValueError(
                f"{field} is not a setting of policy {policy}, only of {', '.join(having)}: leave it out, or choose "
                "another policy"
            )
    return {**given, "policy": policy}


Mixture = Annotated[MixtureOfPolicy, Field(discriminator="policy"), BeforeValidator(with_policy)]
