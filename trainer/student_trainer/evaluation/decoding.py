"""Metrics of what a block-diffusion student fills in and generates. Built by `open`, called by `evaluator`.

- Infilling: spans of four held-out tokens, given everything to their left and the rest of their block to their right.
  `infilled_exactly`: the fraction of spans with every token right; `infilled_tokens`: that of tokens. The spans are the
  same for all block sizes.
- Texts generated from held-out prompts, at each of `evaluation.thresholds`: tokens per forward pass
  (`written_THRESHOLD_tokens_per_pass`; passes over the prompt do not count, those over finished blocks do), their
  perplexity under the autoregressive teacher (`_perplexity`), and the entropy of their token frequencies in nats
  (`_entropy`), since repetitive text has a low perplexity too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.evaluation.records import Metrics
from student_trainer.rollouts.block_decoding import BlockDecoder
from student_trainer.rollouts.block_sampler import BlockSampler
from student_trainer.rollouts.prompts import beginnings
from student_trainer.rollouts.sampler import Sample
from student_trainer.settings import EvaluationSettings
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.diffusion_record import LARGEST_BLOCK
from student_trainer.students.student import Student

# Spans of SPAN tokens begin at position AT of every sixteen, so blocks of 16 and more have tokens to their right.
EVERY, AT, SPAN = 16, 4, 4


class Decoding:
    """`batches`: the held-out rows by source. `ends`: tokens that end a text. `judge`: returns the teacher's logprobs
    of a batch's tokens; None without a teacher, in which case no texts are generated.
    """

    def __init__(
        self, settings: EvaluationSettings, batches: Mapping[str, Sequence[Batch]], ends: Sequence[int],
        judge: Callable[[Batch], BatchTargets] | None,
    ):  # fmt: skip
        self._settings, self._ends, self._judge = settings, tuple(ends), judge
        self._spans = {name: spans_of(group)[: settings.infilled] for name, group in batches.items()}
        judged = settings.judged if judge is not None else 0
        self._prompts = {name: _prompts(group, settings)[:judged] for name, group in batches.items()}

    def metrics(self, student: Student, source: str, meanwhile: Callable[[], None]) -> Metrics:
        """The metrics of one source. `meanwhile` is called before every pass, and may raise to give up."""
        assert isinstance(student.reader, DiffusionReader)
        metrics: Metrics = {}
        if spans := self._spans.get(source):
            metrics |= self._infilled(student, student.reader, spans, meanwhile)
        if prompts := self._prompts.get(source):
            for threshold in self._settings.thresholds:
                metrics |= self._written(student, threshold, prompts, meanwhile)
        return metrics

    def _infilled(
        self, student: Student, reader: DiffusionReader, spans: Sequence[tuple[np.ndarray, int]],
        meanwhile: Callable[[], None],
    ) -> Metrics:  # fmt: skip
        rows = []
        for ids_N, start in spans:
            rows.append(ids_N.copy())
            rows[-1][start : start + SPAN] = reader.record.mask_token_id
        filled = BlockDecoder(student, reader.record, (), reader.threshold).fill_in(rows, None, meanwhile)
        right_RS = np.array([
            one.ids_N[start : start + SPAN] == ids_N[start : start + SPAN]
            for one, (ids_N, start) in zip(filled, spans, strict=True)
        ])  # fmt: skip
        return {
            "infilled_exactly": float(right_RS.all(1).mean()), "infilled_tokens": float(right_RS.mean()),
            "infilled_spans": len(spans),
        }  # fmt: skip

    def _written(
        self, student: Student, threshold: float, prompts: Sequence[np.ndarray], meanwhile: Callable[[], None]
    ) -> Metrics:
        sampler = BlockSampler(student, self._ends, threshold=threshold)
        samples = sampler.sample(
            prompts, range(len(prompts)), new_tokens=self._settings.sample_tokens,
            temperature=self._settings.temperature, meanwhile=meanwhile,
        )  # fmt: skip
        tokens = sum(len(sample.ids_N) for sample in samples)
        passes = sum(sample.passes.writing for sample in samples if sample.passes is not None)
        name = f"written_{threshold:g}"
        return {
            f"{name}_tokens_per_pass": tokens / passes,
            f"{name}_perplexity": self._perplexity(prompts, samples),
            f"{name}_entropy": _entropy(np.concatenate([sample.ids_N for sample in samples])),
            f"{name}_tokens": tokens,
        }

    def _perplexity(self, prompts: Sequence[np.ndarray], samples: Sequence[Sample]) -> float:
        """The teacher's perplexity of the generated texts, given their prompts."""
        assert self._judge is not None
        rows = [
            [Placed(0, f"judged:{row}", np.concatenate([ids_N, sample.ids_N]).astype(np.int32),
                    np.arange(len(ids_N) + len(sample.ids_N)) >= len(ids_N))]
            for row, (ids_N, sample) in enumerate(zip(prompts, samples, strict=True))
        ]  # fmt: skip
        batch = build_batch(0, rows, max(len(placed.ids_N) for (placed,) in rows), 0, ("judged",))
        total, count = 0.0, 0
        for document, answer in zip(batch.documents, self._judge(batch).documents, strict=True):
            assert answer is not None and answer.next_logprob is not None
            counts_R = batch.loss_mask_BT[document.row, answer.start : answer.start + answer.num_rows]
            total += float(answer.next_logprob[counts_R].astype(np.float64).sum())
            count += int(counts_R.sum())
        return math.exp(-total / count)


def spans_of(batches: Sequence[Batch]) -> list[tuple[np.ndarray, int]]:
    """(tokens, position of the span): one for each document, then a second for each, and so on. The tokens end with the
    largest possible block around the span.
    """
    turns: list[tuple[int, np.ndarray, int]] = []
    draw = np.random.default_rng(0)
    for batch in batches:
        for document in batch.documents:
            ids_N = batch.tokens_BT[document.row, document.start : document.stop]
            # Token t counts if the position before it, which predicts it, does.
            learnt_N = batch.loss_mask_BT[document.row, document.start : document.stop - 1]
            places = [
                start for start in range(EVERY + AT, len(ids_N) - SPAN + 1, EVERY)
                if learnt_N[start - 1 : start - 1 + SPAN].all()
            ]  # fmt: skip
            for turn, start in enumerate(draw.permutation(places).tolist()):
                stop = (start // LARGEST_BLOCK + 1) * LARGEST_BLOCK
                turns.append((turn, ids_N[:stop], int(start)))
    turns.sort(key=lambda each: each[0])
    return [(ids_N, start) for _, ids_N, start in turns]


def _prompts(batches: Sequence[Batch], settings: EvaluationSettings) -> list[np.ndarray]:
    """Prompts from the beginnings of held-out documents, those of full length first."""
    found = []
    for batch in batches:
        for document in batch.documents:
            for start, stop in beginnings(batch, document, settings.prompt_tokens, settings.sample_tokens):
                found.append(batch.tokens_BT[document.row, start:stop])
                break
    return sorted(found, key=lambda ids_N: len(ids_N) < settings.prompt_tokens)


def _entropy(ids_N: np.ndarray) -> float:
    p_M = np.unique(ids_N, return_counts=True)[1] / len(ids_N)
    return float(-(p_M * np.log(p_M)).sum())
