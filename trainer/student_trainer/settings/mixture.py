"""How the weights of the sources may change in a run: the settings under `data.mixture`, one class a policy.

Read by `data.policies`. A policy is told by `policy`; a setting that only another one has is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from student_trainer.settings.section import Names, Positive, Share


class MixtureSettings(BaseModel):
    """What every mixture policy has; see `data.policies`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    lag: int = Field(32, ge=1, description="updates between what a policy observes and the batch that follows from it")

    needs_teacher: ClassVar[bool] = False

    @property
    def named_sources(self) -> tuple[str, ...]:
        """The sources that the settings name, which must be there."""
        return ()


class StaticMixture(MixtureSettings):
    """The sources' own weights throughout."""

    policy: Literal["static"] = Field("static", description="who decides how much each source gives")


class AdaptiveMixture(MixtureSettings):
    """Of policies that change the weights. `floor` and `cap` hold for every decision of each of them."""

    update_interval: int = Field(1000, ge=1, description="updates from one decision to the next")
    floor: Share = Field(0.05, description="least that a source is given, as a part of its own weight")
    cap: Positive = Field(0.8, le=1, description="most that a source is given, or its own weight where that is more")


class GapMixture(AdaptiveMixture):
    """Of policies that give more of what the student does worse than its teacher."""

    needs_teacher: ClassVar[bool] = True

    form: Literal["bounded", "exponentiated"] = Field(
        "bounded", description="DDK's update, mixed back to equal shares; or DoReMi's, which may end on one source"
    )
    kept: Share = Field(0.5, description="bounded: what is not mixed back to equal shares")
    start: Literal["prior", "measured"] = Field(
        "prior", description="bounded: the first decision steps from the sources' own weights, or takes the gaps' alone"
    )
    eta: Positive = Field(1.0, description="how hard a score pulls, in the exponent")
    smoothing: Share = Field(1e-3, description="exponentiated: what is given in equal shares")
    over: Names = Field((), description="sources among which shares move, as those like the probe; empty: all")

    @property
    def named_sources(self) -> tuple[str, ...]:
        return self.over


class ExcessMixture(GapMixture):
    """By cross-entropy of the student less that of the teacher."""

    policy: Literal["excess"] = "excess"


class DivergenceMixture(GapMixture):
    """By KL(teacher‖student)."""

    policy: Literal["divergence"] = "divergence"


class AdoMixture(AdaptiveMixture):
    """By a scaling law of each source's loss; it needs no teacher."""

    policy: Literal["ado"] = "ado"


class InfluenceMixture(AdaptiveMixture):
    """By how far a source's gradient points where the probe's does."""

    policy: Literal["influence"] = "influence"
    probe: Names = Field(
        (), description="sources whose held-out rows are the probe, one of weight 0 being for that alone; empty: all"
    )
    score: Literal["cosine", "doge", "dot"] = Field(
        "cosine",
        description="of a source's mean gradient with the probe's; or DoGE's clipped product, or DGA's product",
    )
    eta: Positive = Field(5.0, description="how hard a score pulls, in the exponent")
    kept: Share = Field(0.9, description="what stays of the weights at a decision")
    most_change: Positive = Field(0.2, le=1, description="most that a decision changes a weight, as a part of it")
    worse_by: float = Field(
        0.01, ge=0, description="rise of the probe's loss, as a part of it, at which the sources' own weights come back"
    )
    precondition: bool = Field(False, description="divide the sources' gradients as Adam divides its steps")
    sketch_size: int = Field(4096, ge=16, description="numbers that a gradient is projected to, a power of two")
    sketch_steps: int = Field(4, ge=1, description="updates before a decision whose gradients are sketched")
    modules: Names = Field(("down_proj",), description="modules whose gradients are taken, by the end of their names")
    module_count: int = Field(4, ge=1, description="how many of them, evenly out of the last third")

    @property
    def named_sources(self) -> tuple[str, ...]:
        return self.probe

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sketch_size & (self.sketch_size - 1):
            raise ValueError(f"sketch_size is {self.sketch_size}, expected a power of two, as 4096")
        if self.sketch_steps > self.update_interval:
            raise ValueError(
                f"sketch_steps is {self.sketch_steps}, update_interval {self.update_interval}: there are not so many "
                "updates between two decisions"
            )
        return self


MixtureOfPolicy = StaticMixture | ExcessMixture | DivergenceMixture | AdoMixture | InfluenceMixture
MIXTURES: dict[str, type[MixtureSettings]] = {
    each.model_fields["policy"].default: each for each in get_args(MixtureOfPolicy)
}


def with_policy(given: Any) -> Any:
    """The settings with their policy written out. ValueError for one that is not known, and for a setting that only
    another one has.
    """
    if not isinstance(given, dict):
        return given
    policy = given.get("policy", "static")
    if policy not in MIXTURES:
        raise ValueError(f"policy: got '{policy}', expected one of {', '.join(MIXTURES)}")
    for field in given.keys() - MIXTURES[policy].model_fields.keys():
        if having := [other for other, settings in MIXTURES.items() if field in settings.model_fields]:
            raise ValueError(
                f"{field} is no setting of policy {policy}, only of {', '.join(having)}: leave it out, or give another "
                "policy"
            )
    return {**given, "policy": policy}


Mixture = Annotated[MixtureOfPolicy, Field(discriminator="policy"), BeforeValidator(with_policy)]
