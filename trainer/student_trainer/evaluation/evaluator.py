"""Held-out metrics by source: cross-entropy, KL(teacher‖student), agreement. Built by `open`, called by `run`.

KL is at temperature 1, over the served K ids and one bucket for all others, which is a lower bound of the full KL; or,
with `evaluation.kl=full`, over the whole vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.head import Head
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import ViewSeed
from student_trainer.evaluation.classes import ClassSums
from student_trainer.evaluation.documents import DocumentSums
from student_trainer.evaluation.held_out import HeldOut
from student_trainer.evaluation.mask_rates import MaskRates
from student_trainer.evaluation.passage import can_be_shown, make_passage
from student_trainer.evaluation.records import ClassMetrics, DocumentMetrics, Evaluation, Metrics
from student_trainer.losses.kinds import token_term
from student_trainer.losses.metrics import LossSums
from student_trainer.losses.terms import TokenTerm
from student_trainer.ranks import ALONE, Ranks
from student_trainer.settings import EvaluationSettings
from student_trainer.students.student import Student
from teacher_proto.process.stages import stage

CROSS_ENTROPY = token_term("cross_entropy", "cross_entropy")
KL: dict[str, TokenTerm] = {
    "top_k": token_term("kl", "top_k_kl"),
    "full": token_term("kl", "forward_kl", support="full"),
}


class DecodingMetrics(Protocol):
    """Further metrics of a student on one source, such as those of `decoding.Decoding`."""

    def metrics(self, student: Student, source: str, meanwhile: Callable[[], None]) -> Metrics: ...


class Evaluator:
    """`micro_rows`: rows per forward pass. `decode`: token ids to text. `head`: the teacher's, for the full KL.
    `classes`: for each source of format classification, the ids of its class words. `decoding`: for a block-diffusion
    student that can generate here. With several `ranks`, each has its own rows of every batch, and all call the methods
    together.
    """

    def __init__(
        self, settings: EvaluationSettings, held_out: HeldOut, micro_rows: int | None,
        decode: Callable[[Sequence[int]], str], passage_file: Path, seed: ViewSeed, head: Head | None = None,
        classes: Mapping[str, Sequence[int]] | None = None, ranks: Ranks = ALONE,
        decoding: DecodingMetrics | None = None,
    ):  # fmt: skip
        self._settings, self._held_out, self._micro_rows = settings, held_out, micro_rows
        self._decode, self._passage_file, self._seed, self._head = decode, passage_file, seed, head
        self._classes, self._ranks, self._decoding = classes or {}, ranks, decoding

    def due(self, step: int, steps: int) -> bool:
        return self._settings.every > 0 and (step == steps or step % self._settings.every == 0)

    def due_at_start(self) -> bool:
        return self._settings.every > 0 and self._settings.at_start

    def evaluate(self, student: Student, pause: Callable[[], None] = lambda: None) -> Evaluation:
        """Metrics by source, means over its held-out tokens; `kl` and `agreement` are None without a teacher.

        A source of format classification also has `accuracy`: how often the likeliest class word is the right one. A
        block-diffusion student also has the metrics of `mask_rates` and `decoding`.
        `pause` is called after each batch, and may raise to give up.
        """
        by_source: dict[str, Metrics] = {}
        documents: list[DocumentMetrics] = []
        classes: list[ClassMetrics] = []
        names = self._held_out.batches if self._settings.every > 0 else ()
        count = sum(len(self._held_out.batches[name]) for name in names)
        with stage("evaluating", count, "batches", closing=False) as doing:

            def done() -> None:
                doing.done += 1
                pause()

            for name in names:
                by_source[name], of_documents, of_classes = self._metrics(student, name, done)
                documents += of_documents
                classes += of_classes
                if self._decoding is not None:
                    by_source[name] |= self._decoding.metrics(student, name, pause)
        return Evaluation(by_source, documents, classes)

    def write_passage(self, student: Student) -> None:
        """Write a held-out text with teacher's and student's predictions for each token, for the report."""
        for name, batches in self._held_out.batches.items():
            if batches and self._held_out.targets[name][0] is not None and self._settings.every > 0:
                self._write_passage(student, batches[0], self._held_out.targets[name][0])
                return

    def _write_passage(self, student: Student, batch: Batch, targets: BatchTargets | None) -> None:
        if self._ranks.first:
            self._ranks.total(can_be_shown(targets))
            passage = make_passage(student, batch, targets, lambda token: self._decode([token]), self._seed)
            self._passage_file.write_text(json.dumps(passage))
        elif self._ranks.total(0):
            # Rank 0's forward pass gathers sharded parameters, so the other ranks must run one too.
            for micro in cut(batch.rows(0, 1), None, student, self._seed, keep_empty=True):
                student.logits(micro.to(student.device))

    def _metrics(
        self, student: Student, name: str, done: Callable[[], None]
    ) -> tuple[Metrics, list[DocumentMetrics], list[ClassMetrics]]:
        batches, answers = self._held_out.batches[name], self._held_out.targets[name]
        has_teacher = all(answer is not None for answer in answers)
        terms = (CROSS_ENTROPY, KL[self._settings.kl]) if has_teacher else (CROSS_ENTROPY,)
        sums = LossSums(terms, batches[0].source_names)
        documents, rates = DocumentSums(name, has_teacher), MaskRates.of(student)
        tokens = 0
        # Total weight of labels that agree, of those that are right, and of all; on the device until the end.
        hits_3 = torch.zeros(3, dtype=torch.float64, device=student.device)
        words = self._classes.get(name)
        classes = ClassSums(name, words, self._decode) if words else None
        with student.resting():
            for batch, answer in zip(batches, answers, strict=True):
                for micro in cut(
                    batch, answer, student, self._seed, rows=self._micro_rows, head=self._head,
                    keep_empty=not self._ranks.alone,
                ):  # fmt: skip
                    micro = micro.to(student.device)
                    loss, logits_NV = student.loss_and_logits(
                        micro, terms, None, want_top1=has_teacher, want_logits=words is not None
                    )
                    sums.add(loss, micro)
                    tokens += len(micro.view.labels_N)
                    agrees_N = _agreements(micro, loss.top1_N) if has_teacher and len(micro.view.labels_N) else None
                    documents.add(batch, micro, loss, agrees_N)
                    if rates is not None:
                        rates.add(micro, loss.per_term["cross_entropy"])
                    hits_3[0] += 0 if agrees_N is None else _weight(micro, agrees_N)
                    if classes is not None and logits_NV is not None:
                        hits_3[1] += _weight(micro, classes.add(batch, micro, logits_NV))
                    hits_3[2] += _weight(micro, torch.ones_like(micro.view.labels_N))
                done()
        means = sums.metrics(ranks=self._ranks).terms
        agreed, correct, weight = self._ranks.add_up(hits_3.cpu()).tolist()
        metrics: Metrics = {
            "cross_entropy": means["cross_entropy"],
            "kl": means["kl"] if has_teacher else None,
            "agreement": agreed / weight if has_teacher and weight else None,
            "tokens": self._ranks.total(tokens),
            **({"accuracy": correct / weight} if words and weight else {}),
            **(rates.metrics(self._ranks) if rates is not None else {}),
        }
        return metrics, documents.metrics(self._ranks), [] if classes is None else [classes.metrics(self._ranks)]


def _agreements(micro: MicroBatch, top1_N: torch.Tensor | None) -> torch.Tensor:
    """[N] bool: where student and teacher have the same likeliest token."""
    assert micro.teacher is not None and micro.teacher.ids_NK is not None and top1_N is not None
    return top1_N == micro.teacher.ids_NK[:, 0]


def _weight(micro: MicroBatch, chosen_N: torch.Tensor) -> torch.Tensor:
    """The total weight of the chosen labels, or their number if labels have no weights."""
    weights_N = micro.view.weights_N
    return chosen_N.sum() if weights_N is None else (chosen_N * weights_N.double()).sum()
