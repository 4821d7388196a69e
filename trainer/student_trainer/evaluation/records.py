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
class ClassExample:
    """One held-out example with a class: what stands before the class's word, the right class, the student's and the
    teacher's (by number), with their probabilities among the classes. None where the teacher says nothing of them.
    """

    document: str
    prompt: str
    right: int
    student: int
    student_probability: float
    teacher: int | None
    teacher_probability: float | None


@dataclass(frozen=True)
class ClassFigures:
    """Of a source with classes: their words; how often each right class (a row) was taken for which (a column), by the
    student and by the teacher; and a few examples, the same in every evaluation.
    """

    source: str
    words: Sequence[str]
    student: Sequence[Sequence[int]]
    teacher: Sequence[Sequence[int]] | None
    examples: Sequence[ClassExample]


@dataclass(frozen=True)
class Evaluation:
    """Figures by source, the sums of every held-out document that they are made of, and what is said of classes."""

    by_source: Mapping[str, Figures]
    documents: Sequence[DocumentFigures]
    classes: Sequence[ClassFigures] = ()


@dataclass(frozen=True)
class SampledText:
    """One prompt, what the student wrote after it, and what the document says there."""

    source: str
    document: str
    prompt: str
    written: str
    ended: bool
    instead: str
