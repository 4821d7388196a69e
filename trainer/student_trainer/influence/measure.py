"""Measures the influence of one source's documents on those of another, the target. Called by `cli.influence`.

    gradients of the target's documents and of landmarks, which are some of the documents, chosen by hash
    embeddings of all documents, if there are more than the landmarks, from which the others' influence is estimated

Results are saved in parts beside the output, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.head import Head
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import EVALUATION, ViewSeed
from student_trainer.data.documents import RawDocument, canonical
from student_trainer.data.loader import BatchSource
from student_trainer.data.order import hashed, key_of
from student_trainer.influence import gradients, scores
from student_trainer.influence.embeddings import FirstBlocks, embed
from student_trainer.influence.gradients import Sketch, chosen_parameters, document_gradient
from student_trainer.influence.part_files import PartFiles
from student_trainer.losses.terms import Term
from student_trainer.students.student import Student
from student_trainer.targets.background import EventThread, gather
from student_trainer.targets.protocol import Targets
from student_trainer.targets.queries import queries_of
from teacher_proto.process.stages import stage
from teacher_proto.requests import TargetSpec

CHUNK = 256  # documents per saved part of embeddings
GROUP = 32  # documents per saved part of gradients
ROWS = 8  # rows per forward pass
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Options of the measurement; `strength` is that of `scores.sample_weights`."""

    landmarks: int = 2048
    target_documents: int = 256
    blocks: int = 4
    tangents: int = 2
    sketch: int = 8192
    parameters: str = gradients.OUTPUTS
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Objective:
    """The training loss: its terms, and what they need from the teacher, None without one."""

    terms: tuple[Term, ...]
    chunk_rows: int | None
    spec: TargetSpec | None = None
    targets: Targets | None = None
    head: Head | None = None


@dataclass(frozen=True, eq=False)
class Influence:
    """`influence_N`: in the order of the source's `scan`, NaN for documents with no token to learn. `trust`: how well
    landmarks predict each other's influence; None if all documents are landmarks.
    """

    influence_N: Tensor
    weights_N: Tensor
    landmarks: int
    targets: int
    trust: float | None = None


class Measure:
    """Measures the influence of the documents of `source`'s source "data" on those of its source "target"."""

    def __init__(
        self,
        source: BatchSource,
        student: Student,
        objective: Objective,
        thread: EventThread,
        options: Options,
        pad_id: int,
    ) -> None:
        self._source, self._student, self._objective, self._thread = source, student, objective, thread
        self._options, self._pad_id, self._seed = options, pad_id, source.seed
        self._parameters = list(chosen_parameters(student.model, options.parameters).values())
        self._sketch = Sketch(self._parameters, options.sketch, source.seed)
        self._first = FirstBlocks(student, options.blocks)

    def fingerprint(self) -> str:
        """Everything that the saved parts depend on."""
        weights = [float(parameter.detach().double().sum()) for parameter in self._student.model.parameters()]
        state = self._source.initial_state()
        known = {
            "options": asdict(self._options) | {"strength": None},
            "sources": [source.fingerprint for source in state.sources],
            "terms": [repr(term) for term in self._objective.terms],
            "spec": repr(self._objective.spec),
            "seq_len": self._source.settings.seq_len,
            "student": hashlib.sha256(json.dumps(weights).encode()).hexdigest(),
            "seed": self._seed,
        }
        return json.dumps(known, sort_keys=True)

    def __call__(self, kept: PartFiles) -> Influence:
        """ValueError if there is nothing to measure, or if data and target share a document."""
        target = [placed for _, placed in islice(self._learnt("target"), self._options.target_documents)]
        if not target:
            raise ValueError("the target has no document with a token to learn from; give one with text in it")
        count = self._check_apart()
        # A hash of each index, so that the choice depends only on seed and data.
        chance_N = hashed(count, key_of(self._seed, "landmarks"))
        wanted = set(np.argsort(chance_N, kind="stable")[: self._options.landmarks].tolist())
        exact = count <= self._options.landmarks
        landmarks, places, embeddings = self._read(wanted, count, exact, kept)
        targets_MR = self._gradients("target", target, kept)
        gradients_LR = self._gradients("landmark", list(landmarks.values()), kept)
        influence_L = scores.alignments(gradients_LR, targets_MR)
        influence_N = torch.full((count,), float("nan"), dtype=torch.float64)
        sure: float | None = None
        if embeddings is not None:
            row_of = {place: row for row, place in enumerate(places)}
            of_landmarks_LE = embeddings[[row_of[place] for place in landmarks]]
            sure = scores.trust(of_landmarks_LE, influence_L)
            influence_N[places] = scores.Propagation.of(of_landmarks_LE, influence_L)(embeddings)
        # Landmarks have exact values, which replace their estimates.
        influence_N[list(landmarks)] = influence_L
        known_N = ~influence_N.isnan()
        weights_N = torch.zeros(count, dtype=torch.float64)
        weights_N[known_N] = scores.sample_weights(influence_N[known_N], self._options.strength)
        return Influence(influence_N, weights_N, len(landmarks), len(target), sure)

    def _check_apart(self) -> int:
        """The number of documents in the data. ValueError if there are none, or if one is in the target too."""
        of_target = {_digest(raw) for raw, _ in self._source.documents("target")}
        count = 0
        for raw in self._source.raw_documents("data"):
            if _digest(raw) in of_target:
                shown = canonical(raw.content)[:60]
                raise ValueError(
                    f"document {raw.index} of the data is also among the targets ({shown!r}): it would be chosen "
                    "because it matches itself; use held-out targets"
                )
            count += 1
        if count == 0:
            raise ValueError("the data contain no documents")
        return count

    def _learnt(self, name: str) -> Iterator[tuple[int, Placed]]:
        """The documents with tokens to learn, cut to a row, with their index."""
        for place, (_, placed) in enumerate(self._source.documents(name)):
            if placed is not None:
                yield place, placed

    def _read(
        self, wanted: set[int], count: int, exact: bool, kept: PartFiles
    ) -> tuple[dict[int, Placed], list[int], Tensor | None]:
        """The landmarks by index; the indices of all documents with tokens to learn; and the embeddings of these, None
        if all are landmarks.
        """
        landmarks: dict[int, Placed] = {}
        places: list[int] = []
        parts: list[Tensor] = []
        with stage("embedding documents" if not exact else "reading documents", count, "documents") as doing:
            for number, chunk in enumerate(_chunks(self._learnt("data"), CHUNK)):
                landmarks |= {place: placed for place, placed in chunk if place in wanted}
                places += [place for place, _ in chunk]
                if not exact:
                    name = f"embeddings-{number:06d}"
                    part = kept.find(name)
                    if part is None:
                        part = kept.keep(name, self._embed([placed for _, placed in chunk], number))
                    parts.append(part)
                doing.done = chunk[-1][0] + 1
        if not landmarks:
            raise ValueError("the data have no document with a token to learn from; give some with text in them")
        return landmarks, places, torch.cat(parts) if parts else None

    def _embed(self, chunk: Sequence[Placed], number: int) -> Tensor:
        # Sorted by length, so that there is little padding; put back in order below.
        order = sorted(range(len(chunk)), key=lambda i: len(chunk[i].ids_N))
        micros = []
        for start in range(0, len(order), ROWS):
            batch = self._batch([chunk[i] for i in order[start : start + ROWS]], number * CHUNK + start)
            micros.append(self._views(batch, None)[0])
        made_NE = embed(self._first, micros, self._options.tangents, self._seed)
        in_order = torch.empty_like(made_NE)
        in_order[order] = made_NE
        return in_order

    def _gradients(self, what: str, documents: Sequence[Placed], kept: PartFiles) -> Tensor:
        """[documents, R]: the sketches of the documents' gradients."""
        parts = []
        with (
            stage(f"computing gradients of {what} documents", len(documents), "documents") as doing,
            gradients.differentiating(self._student, self._parameters),
        ):
            for start in range(0, len(documents), GROUP):
                name = f"{what}-{start // GROUP:06d}"
                group = documents[start : start + GROUP]
                part = kept.find(name)
                if part is None:
                    part = kept.keep(name, self._group(group, start))
                parts.append(part)
                doing.done += len(group)
        return torch.cat(parts)

    def _group(self, group: Sequence[Placed], start: int) -> Tensor:
        batches = [self._batch([placed], start + i) for i, placed in enumerate(group)]
        made = []
        for batch, answer in zip(batches, self._answers(batches), strict=True):
            views = self._views(batch, answer)
            found = document_gradient(
                self._student, views, self._objective.terms, self._objective.chunk_rows, self._parameters
            )
            made.append(self._sketch(found))
        return torch.stack(made)

    def _answers(self, batches: Sequence[Batch]) -> Sequence[BatchTargets | None]:
        objective = self._objective
        if objective.targets is None or objective.spec is None:
            return [None] * len(batches)
        fetched = gather(objective.targets.fetch(batch, queries_of(batch, objective.spec)) for batch in batches)
        return self._thread.call(fetched)

    def _views(self, batch: Batch, answer: BatchTargets | None) -> tuple[MicroBatch, ...]:
        seed = ViewSeed(self._seed, EVALUATION)
        views = cut(batch, answer, self._student, seed, head=self._objective.head)
        return tuple(view.to(self._student.device) for view in views)

    def _batch(self, rows: Sequence[Placed], number: int) -> Batch:
        """A batch with one document per row, as wide as the longest."""
        width = max(len(placed.ids_N) for placed in rows)
        return build_batch(number, [[placed] for placed in rows], width, self._pad_id, self._source.names)


def _digest(raw: RawDocument) -> bytes:
    return hashlib.sha256(canonical(raw.content).encode("utf-8", "surrogatepass")).digest()[:16]


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
