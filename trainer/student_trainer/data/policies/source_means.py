"""Means per source over the updates between two decisions. Used by policies that depend on losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Sums = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class SourceMeans:
    """`sums`: by source, (value * tokens, tokens) since the last decision. `last`: by source, the mean before it, if
    there was one; a source of which nothing was drawn since keeps it.
    """

    sums: Sums = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, float], metrics: Mapping[str, float]) -> SourceMeans:
        """Add an update's `values` by source, each weighted by the source's tokens in `metrics`."""
        sums = dict(self.sums)
        for name, value in values.items():
            tokens = metrics[f"source/{name}/tokens"]
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = (total + value * tokens, count + tokens)
        return replace(self, sums=sums)

    def closed(self) -> SourceMeans:
        """Turn the sums since the last decision into the last means, and start new sums."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        return SourceMeans(last={**self.last, **means})

    def of(self, names: Mapping[str, float]) -> dict[str, float]:
        """The last mean of each of these sources. One that was never drawn gets the mean of the others, so that it
        neither gains nor loses. Empty if none was drawn.
        """
        known = [self.last[name] for name in names if name in self.last]
        if not known:
            return {}
        return {name: self.last.get(name, sum(known) / len(known)) for name in names}

    def state(self) -> dict[str, Any]:
        """The state in a form that JSON holds exactly."""
        return {"sums": {name: list(pair) for name, pair in self.sums.items()}, "last": dict(self.last)}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> SourceMeans:
        sums = {name: (float(total), float(count)) for name, (total, count) in state["sums"].items()}
        return cls(sums, dict(state["last"]))


def of_sources(metrics: Mapping[str, float], figure: str, names: Mapping[str, float]) -> dict[str, float]:
    """A metric by source, for the sources that the batch had tokens of."""
    return {name: metrics[key] for name in names if (key := f"source/{name}/{figure}") in metrics}
