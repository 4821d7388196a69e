"""The `Sampler` of a student that fills in blocks. Made in `open`, and for metrics by `evaluation.decoding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from student_trainer.rollouts.block_decoding import BlockDecoder, Filled
from student_trainer.rollouts.sampler import Sample
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.student import Student


class BlockSampler:
    """Appends to each prompt as many mask tokens as there may be new tokens, and fills them in.

    `ends`, `at_once` as for `GenerateSampler`; `threshold`: by default the reader's.
    """

    def __init__(
        self, student: Student, ends: Sequence[int], at_once: int | None = None, threshold: float | None = None
    ):
        self._student, self._ends, self._at_once = student, tuple(sorted(set(ends))), at_once
        self._threshold = threshold

    def sample(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int] | None, *, new_tokens: int, temperature: float = 1.0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Sample]:  # fmt: skip
        """See `Sampler`."""
        reader = self._student.reader
        assert isinstance(reader, DiffusionReader)
        drawn = 0.0 if seeds is None else temperature
        decoder = BlockDecoder(self._student, reader.record, self._ends, self._threshold or reader.threshold, drawn)
        masks_N = np.full(new_tokens, reader.record.mask_token_id, np.int32)
        samples: list[Sample] = []
        size = self._at_once or max(1, len(prompts))
        for first in range(0, len(prompts), size):
            group = prompts[first : first + size]
            draws = None if seeds is None else [np.random.default_rng(seed) for seed in seeds[first : first + size]]
            filled = decoder.fill_in([np.concatenate([ids_N, masks_N]) for ids_N in group], draws, meanwhile)
            samples += [_continuation(one, len(ids_N)) for one, ids_N in zip(filled, group, strict=True)]
        return samples


def _continuation(filled: Filled, given: int) -> Sample:
    return Sample(filled.ids_N[given:], filled.ended, filled.logprob, filled.written_at_N[given:], filled.passes)
