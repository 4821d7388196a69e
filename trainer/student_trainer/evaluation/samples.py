"""Sample texts that the student writes after the beginnings of held-out documents. Built by `open`, called by `loop`.

Decoding is greedy, so that two evaluations differ only by the student. The texts go to `samples.jsonl`, the report page
and the trackers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from student_trainer.batch.batch import Batch
from student_trainer.evaluation.records import SampledText
from student_trainer.rollouts.prompts import beginnings
from student_trainer.rollouts.sampler import Sampler
from student_trainer.settings import EvaluationSettings
from teacher_proto.process.stages import stage


@dataclass(frozen=True, eq=False)
class _Prompt:
    source: str
    document: str
    ids_N: np.ndarray
    instead_N: np.ndarray


class SampleWriter:
    """`batches`: the held-out rows by source. `sampler`: None if the student can't write. `decode`: ids to text."""

    def __init__(
        self, settings: EvaluationSettings, batches: Mapping[str, Sequence[Batch]], sampler: Sampler | None,
        decode: Callable[[Sequence[int]], str],
    ):  # fmt: skip
        self._new_tokens, self._sampler, self._decode = settings.sample_tokens, sampler, decode
        self._prompts = [
            prompt
            for source, group in batches.items()
            for prompt in _first_prompts(source, group, settings)[: settings.samples]
        ]

    def write(self) -> list[SampledText]:
        """The texts by source, in the order of its held-out documents; empty if none are requested or there is no
        document to begin from.
        """
        if not self._prompts or self._sampler is None:
            return []
        ids = [prompt.ids_N for prompt in self._prompts]
        with stage("writing samples", self._new_tokens, "tokens", closing=False) as doing:

            def written() -> None:
                doing.done = min(doing.done + 1, self._new_tokens)

            samples = self._sampler.sample(ids, None, new_tokens=self._new_tokens, meanwhile=written)
        return [
            SampledText(
                prompt.source, prompt.document, self._text(prompt.ids_N), self._text(sample.ids_N), sample.ended,
                self._text(prompt.instead_N),
            )
            for prompt, sample in zip(self._prompts, samples, strict=True)
        ]  # fmt: skip

    def _text(self, ids_N: np.ndarray) -> str:
        return self._decode(ids_N.tolist())


def _first_prompts(source: str, batches: Sequence[Batch], settings: EvaluationSettings) -> list[_Prompt]:
    """One prompt from each document that is long enough; those of full length come first."""
    prompts = []
    for batch in batches:
        for document in batch.documents:
            for start, stop in beginnings(batch, document, settings.prompt_tokens, settings.sample_tokens):
                tokens_T = batch.tokens_BT[document.row]
                end = min(document.stop, stop + settings.sample_tokens)
                prompts.append(_Prompt(source, document.key, tokens_T[start:stop], tokens_T[stop:end]))
                break
    return sorted(prompts, key=lambda prompt: len(prompt.ids_N) < settings.prompt_tokens)
