"""The results of an evaluation: metrics by source and by document, and texts. Made here, written by `reporting`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Metrics = dict[str, float | int | None]


@dataclass(frozen=True)
class DocumentMetrics:
    """Sums over the counted tokens of one held-out document, in nats; `kl` and `agreed` are None without a teacher.

    Divide them by `tokens` for means. If the view's labels have weights, all sums, `tokens` included, are weighted.
    """

    source: str
    document: str
    tokens: float
    cross_entropy: float
    kl: float | None
    agreed: float | None


@dataclass(frozen=True)
class ClassExample:
    """One held-out classification example: its prompt, the right class, and the student's and the teacher's choices (as
    class indices) with their probabilities among the classes. None if no class word is in the teacher's top K.
    """

    document: str
    prompt: str
    right: int
    student: int
    student_probability: float
    teacher: int | None
    teacher_probability: float | None


@dataclass(frozen=True)
class ClassMetrics:
    """For a source with classes: the class words; the confusion matrices of student and teacher, with a row per right
    class and a column per choice; and a few examples, the same in every evaluation.
    """

    source: str
    words: Sequence[str]
    student: Sequence[Sequence[int]]
    teacher: Sequence[Sequence[int]] | None
    examples: Sequence[ClassExample]


@dataclass(frozen=True)
class Evaluation:
    """Metrics by source, the sums of every held-out document behind them, and the classification results."""

    by_source: Mapping[str, Metrics]
    documents: Sequence[DocumentMetrics]
    classes: Sequence[ClassMetrics] = ()


@dataclass(frozen=True)
class SampledText:
    """One prompt, the student's continuation (`written`), and the document's own (`instead`)."""

    source: str
    document: str
    prompt: str
    written: str
    ended: bool
    instead: str
