"""What the tests of other servers' formats are held against: the scripted teacher's own logits, and docs/api.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from teacher_service.engines.scripted_model import scripted_logits

VOCAB = 512


def truth_of(tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    """log-softmax of the logits at a temperature, [T, V] float64."""
    logits_TV = scripted_logits(np.array(tokens), VOCAB).astype(np.float64) / temperature
    return logits_TV - np.logaddexp.reduce(logits_TV, axis=1)[:, None]


def came_of(tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    """log p of tokens 1, 2, ... given those before."""
    return truth_of(tokens, temperature)[np.arange(len(tokens) - 1), tokens[1:]]


def documented(route: str) -> dict[str, str]:
    """What docs/api.md says becomes of every field of a route."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    section = page.partition(f"## POST {route}")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name: becomes.strip() for names, becomes in rows for name in re.findall(r"`(\w+)`", names)}


def expected(read: Iterable[str], without_effect: Iterable[Iterable[str]], neutral: Iterable[str]) -> dict[str, str]:
    """How it has to begin, by the tables of the code."""
    begins = dict.fromkeys(read, "read")
    begins |= {name: "without effect" for names in without_effect for name in names}
    return begins | dict.fromkeys(neutral, "refused with 422, unless")
