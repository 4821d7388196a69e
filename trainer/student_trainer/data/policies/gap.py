"""Policies that weight sources by how far the student is behind its teacher: `excess` and `divergence`.

`excess`: the student's cross-entropy on the data's own tokens minus the teacher's, whose logprobs of them are part of
all targets. `divergence`: KL(teacher‖student). Both are means over the tokens trained on since the last decision, and
need no extra forward pass. The forms are DDK's (arXiv 2407.16154), which is bounded, and DoReMi's (arXiv 2305.10429),
which moves nearly all weight to one source if the gaps stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from student_trainer.data.policies.adaptive import Adaptive
from student_trainer.data.policies.policy import Weights
from student_trainer.data.policies.source_means import SourceMeans, of_sources
from student_trainer.data.policies.updates import bounded_step, exponentiated_step, perplexity_ratios, tilted
from student_trainer.settings.mixture import GapMixture

STUDENT, TEACHER, DIVERGENCE = "student_cross_entropy", "teacher_cross_entropy", "teacher_divergence"


@dataclass(frozen=True)
class Gap(Adaptive):
    """`settings.over`: the sources among which weight is moved; all others keep theirs."""

    settings: GapMixture
    means: SourceMeans = field(default_factory=SourceMeans)
    begun: bool = False  # whether there has been a decision

    reason = ""

    def gaps(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The gaps of one update, by source."""
        raise NotImplementedError

    def observe(self, step: int, metrics: Mapping[str, float]) -> Self:
        means = self.means.add(self.gaps(metrics), metrics)
        if not self.due(step):
            return replace(self, means=means)
        means = means.closed()
        after = replace(self, means=means)
        moving = {name: self.current[name] for name in self.current if name in (self.settings.over or self.prior)}
        gaps = means.of(moving)
        if not gaps:
            return after
        whole = sum(moving.values())
        # The update is computed on shares among the moving sources; their total weight stays the same.
        stepped = self.step_from({name: weight / whole for name, weight in moving.items()}, gaps)
        wanted = {**self.current, **{name: whole * weight for name, weight in stepped.items()}}
        reasons = {name: {self.reason: gap} for name, gap in gaps.items()}
        # The other sources are pinned to their weights; otherwise the bounds of the moving ones could shift them.
        held = {name: weight for name, weight in self.current.items() if name not in moving}
        low, high = ({**dict.fromkeys(self.prior, bound), **held} for bound in (0.0, 1.0))
        return replace(after.decide(step, wanted, reasons, low=low, high=high), begun=True)

    def step_from(self, weights: Weights, gaps: Mapping[str, float]) -> Weights:
        """Update weights that sum to 1, by the form in the settings."""
        settings = self.settings
        if settings.form == "exponentiated":
            return exponentiated_step(weights, gaps, settings.eta, settings.smoothing)
        if settings.start == "measured" and not self.begun:
            return tilted(dict.fromkeys(weights, 1.0), perplexity_ratios(gaps))
        return bounded_step(weights, gaps, settings.kept)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "means": self.means.state(), "begun": self.begun}

    def restored(self, state: Mapping[str, Any]) -> Self:
        means = SourceMeans.restored(state["means"])
        return replace(super().restored(state), means=means, begun=state["begun"])


@dataclass(frozen=True)
class Excess(Gap):
    watches: tuple[str, ...] = (STUDENT, TEACHER)
    reason = "excess"

    def gaps(self, metrics: Mapping[str, float]) -> dict[str, float]:
        students, teachers = (of_sources(metrics, figure, self.prior) for figure in (STUDENT, TEACHER))
        return {name: students[name] - teachers[name] for name in students if name in teachers}


@dataclass(frozen=True)
class Divergence(Gap):
    watches: tuple[str, ...] = (DIVERGENCE,)
    reason = "divergence"

    def gaps(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return of_sources(metrics, DIVERGENCE, self.prior)
