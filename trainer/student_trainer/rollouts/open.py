"""Makes a student's sampler and the stream of its rollouts from a run's settings. Called by `build` and `generate`, and
by `evaluation.open` for samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from student_trainer.batch.batch import Batch
from student_trainer.data.mixture import MixtureState
from student_trainer.data.tokenise import pad_id
from student_trainer.ranks import Ranks
from student_trainer.rollouts.block_sampler import BlockSampler
from student_trainer.rollouts.rollouts import RolloutStream
from student_trainer.rollouts.sampler import GenerateSampler, Sampler, ends_of_text
from student_trainer.settings import Settings
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.student import Student


def sampler_of(student: Student, ends: Sequence[int], pad_id: int, at_once: int | None = None) -> Sampler | None:
    """The student's sampler: from left to right, or block by block. None for a student that can't write."""
    if student.autoregressive:
        return GenerateSampler(student, ends, pad_id, at_once)
    if isinstance(student.reader, DiffusionReader):
        return BlockSampler(student, ends, at_once)
    return None


def open_rollouts(
    settings: Settings, student: Student, tokenizer: Any, batches: Iterator[tuple[Batch, MixtureState]],
    saved: Mapping[str, Tensor], ranks: Ranks,
) -> RolloutStream | None:  # fmt: skip
    """`batches`, some of which the student writes; None if the settings have it write none. `saved`: pending rollouts
    of the checkpoint that the run resumes from. ValueError for a student that can't write.
    """
    if not settings.on_policy.active:
        return None
    ends = ends_of_text(student, tokenizer)
    if not ends:
        raise ValueError(
            "neither tokenizer nor student names an end-of-text token, so rollouts would never end: give the tokenizer "
            "an eos_token, or set on_policy.share=0"
        )
    sampler = sampler_of(student, ends, pad_id(tokenizer), settings.on_policy.sequences_at_once)
    if sampler is None:
        raise ValueError(
            f"on_policy: there is no sampler for architecture {settings.student.architecture}, so the student can't "
            "write rollouts; set on_policy.share=0"
        )
    return RolloutStream(batches, settings, sampler, pad_id(tokenizer), saved, ranks)
