"""`influence`: more weight for sources whose gradient aligns with the probe's (DoGE, DGA, Influence Distillation).

The probe is held-out text of the user's choice, with the training loss. `evaluation.influence` measures a sketch of
each source's gradient in the last updates before a decision, and the probe's gradient and loss at the decision.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from student_trainer.data.policies.adaptive import Adaptive
from student_trainer.data.policies.policy import Sketches
from student_trainer.data.policies.updates import TINY, averaged_step, doge_scores
from student_trainer.settings.mixture import InfluenceMixture


@dataclass(frozen=True)
class Influence(Adaptive):
    settings: InfluenceMixture
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)  # by source [size] float32, since the last decision
    tokens: Mapping[str, float] = field(default_factory=dict)  # by source, in the sketched updates
    scores: Mapping[str, float] = field(default_factory=dict)  # the last known ones
    probe_loss: float | None = None  # at the last decision
    taken: Sketches | None = None  # of the update to be observed next

    def sketched(self, step: int) -> bool:
        """Whether gradients are sketched in update `step`, one of the last before a decision."""
        interval = self.settings.update_interval
        return step % interval >= interval - self.settings.sketch_steps

    def take_in(self, sketches: Sketches) -> Self:
        return replace(self, taken=sketches)

    def observe(self, step: int, metrics: Mapping[str, float]) -> Self:
        taken, after = self.taken, replace(self, taken=None)
        if taken is None:
            return after
        sums, tokens = dict(self.sums), dict(self.tokens)
        for name, sketch in taken.by_source.items():
            if name in self.prior and (count := metrics.get(f"source/{name}/tokens", 0.0)):
                sums[name] = sums[name] + sketch if name in sums else sketch
                tokens[name] = tokens.get(name, 0.0) + count
        after = replace(after, sums=sums, tokens=tokens)
        if taken.probe is None or taken.probe_loss is None:
            return after
        return after._decided(step, taken.probe, taken.probe_loss)

    def _decided(self, step: int, probe: np.ndarray, probe_loss: float) -> Self:
        scores = {**self.scores, **self._scores(probe)}
        before = self.probe_loss
        after = replace(self, sums={}, tokens={}, scores=scores, probe_loss=probe_loss)
        reasons = {name: {"score": score} for name, score in scores.items()}
        if before is not None and probe_loss > before * (1.0 + self.settings.worse_by):
            note = f"back to the configured weights: the probe's loss rose from {before:.4f} to {probe_loss:.4f}"
            return after.decide(step, self.prior, reasons, note)
        note = f"the probe's loss is {probe_loss:.4f}"
        if not scores:
            return after
        mean = sum(scores.values()) / len(scores)  # for sources that were not drawn in any sketched update
        known = {name: scores.get(name, mean) for name in self.prior}
        wanted = averaged_step(self.current, known, self.settings.eta, self.settings.kept)
        part = self.settings.most_change
        low = {name: (1.0 - part) * weight for name, weight in self.current.items()}
        high = {name: (1.0 + part) * weight for name, weight in self.current.items()}
        return after.decide(step, wanted, reasons, note, low=low, high=high)

    def _scores(self, probe: np.ndarray) -> dict[str, float]:
        """The scores of the sources that were sketched since the last decision."""
        whole = sum(self.tokens.values())
        # A sketch is of the source's part of the total loss; divided by its share of tokens, of its mean gradient.
        means = {name: self.sums[name].astype(np.float64) * (whole / self.tokens[name]) for name in self.sums}
        norms = {name: float(np.linalg.norm(mean)) for name, mean in means.items()}
        target = probe.astype(np.float64)
        dots = {name: float(mean @ target) for name, mean in means.items()}
        if self.settings.score == "cosine":
            length = float(np.linalg.norm(target))
            return {name: dots[name] / max(norms[name] * length, TINY) for name in dots}
        clipped = {name: 1.0 / max(1.0, norm) for name, norm in norms.items()}  # as published: norms of at most 1
        dots = {name: dots[name] * clipped[name] for name in dots}
        if self.settings.score == "dot":
            return dots
        return doge_scores(dots, {name: norms[name] * clipped[name] for name in dots}) if dots else {}

    def state(self) -> dict[str, Any]:
        sums = {name: base64.b64encode(each.astype("<f4").tobytes()).decode() for name, each in self.sums.items()}
        return {
            **super().state(), "sums": sums, "tokens": dict(self.tokens), "scores": dict(self.scores),
            "probe_loss": self.probe_loss,
        }  # fmt: skip

    def restored(self, state: Mapping[str, Any]) -> Self:
        sums = {name: np.frombuffer(base64.b64decode(each), "<f4") for name, each in state["sums"].items()}
        return replace(
            super().restored(state), sums=sums, tokens=state["tokens"], scores=state["scores"],
            probe_loss=state["probe_loss"],
        )  # fmt: skip
