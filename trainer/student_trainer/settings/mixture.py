"""How the weights of the sources may change in a run: the settings under `data.mixture`, one class a policy.

Read by `data.policies`. A policy is told by `policy`; a setting that only another one has is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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


MixtureOfPolicy = StaticMixture | ExcessMixture | DivergenceMixture | AdoMixture
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
