"""Whether the teacher helped: two arms compared pair by pair on the same held-out documents. Called by the demos.

Tokens of one document are correlated, so the standard error is that of a ratio over documents (Cochran, Sampling
Techniques, section 6.4): with d_i = agreed_B - agreed_A and n_i tokens in document i of m, D = sum d / sum n, and
SE^2 = m / (m - 1) * sum (d_i - D n_i)^2 / (sum n)^2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo.measure import Machine
from demo.plan import Plan, minutes_for

Lines = Iterable[Mapping[str, Any]]
# What counts as more than chance.
STANDARD_ERRORS = 2.0
# Steps and held-out tokens that were enough when this was tried: docs/guides/prune.md.
SHOWS_STEPS, SHOWS_TOKENS = 12, 4000


@dataclass(frozen=True)
class Difference:
    """A mean per token over held-out documents, B minus A, and its standard error."""

    mean: float
    standard_error: float
    documents: int
    tokens: int

    @property
    def by_more_than_chance(self) -> bool:
        return self.mean > STANDARD_ERRORS * self.standard_error


@dataclass(frozen=True)
class Verdict:
    """`kl`: by source, (without, with the teacher). `equal_steps`: whether both arms made equally many."""

    agreement: Difference
    kl: Mapping[str, tuple[float, float]]
    equal_steps: bool = True

    @property
    def teacher_helps(self) -> bool:
        """Whether KL is better on every source, and agreement over all sources by more than chance, at equal steps."""
        return self.equal_steps and self.agreement.by_more_than_chance and self.kl_is_better

    @property
    def kl_is_better(self) -> bool:
        return all(with_teacher < without for without, with_teacher in self.kl.values())

    def held_out_factor(self) -> float | None:
        """How many times the held-out text would show the difference that was found; None if there was none."""
        if self.agreement.mean <= 0:
            return None
        # A fifth more, because the difference is itself uncertain.
        return 1.2 * (STANDARD_ERRORS * self.agreement.standard_error / self.agreement.mean) ** 2

    def as_json(self) -> dict[str, Any]:
        return {"agreement": asdict(self.agreement), "kl": dict(self.kl), "teacher_helps": self.teacher_helps,
                "equal_steps": self.equal_steps}  # fmt: skip


def paired(plain: Lines, taught: Lines, figure: str = "agreed") -> Difference:
    """The difference over the lines of two `documents.jsonl`. ValueError unless both have the same documents."""
    a, b = ({(line["source"], line["document"]): line for line in lines} for lines in (plain, taught))
    if a.keys() != b.keys() or len(a) < 2:
        raise ValueError(f"got {len(a)} and {len(b)} held-out documents, expected the same two or more from both runs")
    pairs = [(b[key][figure] - a[key][figure], a[key]["tokens"]) for key in a]
    tokens = sum(n for _, n in pairs)
    mean = sum(d for d, _ in pairs) / tokens
    spread = sum((d - mean * n) ** 2 for d, n in pairs) * len(pairs) / (len(pairs) - 1)
    return Difference(mean, math.sqrt(spread) / tokens, len(pairs), tokens)


def last_documents(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's last evaluation."""
    lines = [json.loads(line) for line in (run / "documents.jsonl").read_text().splitlines()]
    last = max(line["step"] for line in lines)
    return [line for line in lines if line["step"] == last]


def verdict_on(plain: Path, taught: Path, arms: Mapping[str, Any], equal_steps: bool = True) -> Verdict:
    """The verdict on two runs' folders; `arms`: the summary's."""
    before_after = (arms[plain.name]["after"], arms[taught.name]["after"])
    kl = {source: (before_after[0][source]["kl"], before_after[1][source]["kl"]) for source in before_after[0]}
    return Verdict(paired(last_documents(plain), last_documents(taught)), kl, equal_steps)


def sentences(verdict: Verdict) -> str:
    """What was found: a line for each source and one for both together."""
    lines = [
        f"{source}: KL {with_teacher:.3f} with the teacher, {without:.3f} without ({with_teacher / without - 1:+.1%})"
        for source, (without, with_teacher) in verdict.kl.items()
    ]
    agreement = verdict.agreement
    lines.append(
        f"agreement over both sources: {100 * agreement.mean:+.2f} points with the teacher, two standard errors of the "
        f"paired difference are {200 * agreement.standard_error:.2f} ({agreement.documents} documents, "
        f"{agreement.tokens:,} tokens)"
    )
    return "\n".join(lines)


def what_it_takes(verdict: Verdict, plan: Plan, machine: Machine, before_s: float) -> str:
    """Why nothing can be concluded, and how long a demo would take in which it could; empty if the teacher helps.

    A difference that was found is extrapolated to more held-out text. If there was none, the text says what was enough
    elsewhere.
    """
    if verdict.teacher_helps:
        return ""
    if not verdict.equal_steps:
        return (
            "The arms made different numbers of steps because this machine became slower, so they cannot be compared."
        )
    factor, steps = verdict.held_out_factor(), max(plan.steps, SHOWS_STEPS)
    if factor is None or plan.steps < SHOWS_STEPS or not verdict.kl_is_better:
        factor = max(1.0, SHOWS_TOKENS / plan.held_out_tokens)
    minutes = minutes_for(plan, machine, before_s, steps=steps, held_out_factor=max(1.0, factor))
    tokens = max(1.0, factor) * plan.held_out_tokens
    return (
        f"This is not enough to say that the teacher helps. {steps} steps per arm and {tokens:,.0f} held-out tokens "
        f"would be enough, and take about {minutes:.0f} minutes on this machine: --minutes {math.ceil(minutes)}"
    )
