"""What an evaluation says: held-out figures by source and by document, and texts. Made here, written by `reporting`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = dict[str, float | int | None]


@dataclass(frozen=True)
class DocumentFigures:
    """Sums over the tokens of one held-out document that count, in nats; `kl`, `agreed` are None without a teacher.

    `tokens` is what divides them. In a view whose labels have weights, all are sums of those.
    """

    source: str
    document: str
    tokens: float
    cross_entropy: float
    kl: float | None
    agreed: float | None


@dataclass(frozen=True)
class Evaluation:
    """Figures by source, and the sums of every held-out document that they are made of."""

    by_source: Mapping[str, Figures]
    documents: Sequence[DocumentFigures]


@dataclass(frozen=True)
class SampledText:
    """One prompt, what the student wrote after it, and what the document says there."""

    source: str
    document: str
    prompt: str
    written: str
    ended: bool
    instead: str
