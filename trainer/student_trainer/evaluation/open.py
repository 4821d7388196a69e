"""Builds what a run measures besides its loss, from its settings: evaluator, samples, gradients for the mixture. Called
by `build`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.view import EVALUATION, ViewSeed
from student_trainer.components import Components
from student_trainer.data.classification import class_words
from student_trainer.data.tokenise import pad_id
from student_trainer.evaluation.decoding import Decoding
from student_trainer.evaluation.evaluator import Evaluator
from student_trainer.evaluation.held_out import fetch_held_out
from student_trainer.evaluation.influence import HasMoments, InfluenceMeter, NoMeter
from student_trainer.evaluation.samples import SampleWriter
from student_trainer.losses.weighting import Weighting
from student_trainer.ranks import Ranks
from student_trainer.rollouts.open import sampler_of
from student_trainer.rollouts.sampler import ends_of_text
from student_trainer.settings import Settings
from student_trainer.settings.mixture import InfluenceMixture
from student_trainer.state import TrainState
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.targets.attention import NO_TOKENS
from student_trainer.targets.background import EventThread
from student_trainer.targets.prefetch import Ready
from student_trainer.targets.protocol import held_out_spec
from student_trainer.targets.queries import queries_of
from teacher_proto.process.stages import stage
from teacher_proto.requests import TargetSpec

logger = logging.getLogger(__name__)


def open_evaluator(
    settings: Settings, components: Components, folder: Path, thread: EventThread, ranks: Ranks
) -> Evaluator:
    """The evaluator, after fetching the targets of all held-out rows."""
    batches = _held_out(settings, components)
    teacher, tokenizer = components.teacher, components.tokenizer
    held_out = fetch_held_out(
        batches, teacher.targets if teacher else None, thread, held_out_spec(settings), components.describe_waiting
    )
    decode: Callable[[Sequence[int]], str] = lambda ids: str(tokenizer.decode(ids))  # noqa: E731
    return Evaluator(
        settings.evaluation, held_out, settings.optim.micro_batch_rows, decode, folder / "passage.json",
        ViewSeed(settings.run.seed, EVALUATION), components.head, class_words(settings.data, tokenizer), ranks,
        _decoding(settings, components, batches, thread, ranks),
    )  # fmt: skip


def open_samples(settings: Settings, components: Components, ranks: Ranks) -> SampleWriter:
    """The writer of sample texts. If the student can't write, it writes nothing, and a warning says so."""
    student, tokenizer = components.student, components.tokenizer
    wanted = settings.evaluation.every and settings.evaluation.samples
    if not ranks.alone and wanted:
        logger.warning("evaluation.samples has no effect: a student sharded over several ranks can't generate text yet")
    decode: Callable[[Sequence[int]], str] = lambda ids: str(tokenizer.decode(ids))  # noqa: E731
    sampler = sampler_of(student, ends_of_text(student, tokenizer), pad_id(tokenizer))
    if sampler is None and wanted:
        architecture = settings.student.architecture
        logger.warning("evaluation.samples has no effect: there is no sampler for architecture %s", architecture)
    held_out = _held_out(settings, components) if ranks.alone and sampler else {}
    return SampleWriter(settings.evaluation, held_out, sampler, decode)


def open_meter(
    settings: Settings, components: Components, losses: Weighting, optimizer: HasMoments, state: TrainState,
    thread: EventThread, ranks: Ranks,
) -> NoMeter:  # fmt: skip
    """The meter of gradients for the mixture, if it depends on them. `losses`: the data's losses."""
    source, student = components.source, components.student
    if not isinstance(settings.data.mixture, InfluenceMixture):
        return NoMeter()
    spec = components.spec(settings, losses.terms + losses.watched)
    batches = {name: source.held_out(name) for name in settings.data.probe}
    held_out = fetch_held_out(
        batches, components.targets if spec else None, thread, spec or NO_TOKENS, components.describe_waiting
    )
    probe = [
        Ready(batch, state.mixture, answer, cut(
            batch, answer, student, ViewSeed(settings.run.seed, EVALUATION), rows=settings.optim.micro_batch_rows,
            head=components.head, keep_empty=not ranks.alone))
        for name in batches for batch, answer in zip(batches[name], held_out.targets[name], strict=True)
    ]  # fmt: skip
    return InfluenceMeter(settings, student, optimizer, source.names, probe, ranks)


def _held_out(settings: Settings, components: Components) -> dict[str, list[Batch]]:
    names = components.source.names if settings.evaluation.every else ()
    with stage("reading the held-out documents"):
        return {name: group for name in names if (group := components.source.held_out(name))}


def _decoding(
    settings: Settings, components: Components, batches: Mapping[str, Sequence[Batch]], thread: EventThread,
    ranks: Ranks,
) -> Decoding | None:  # fmt: skip
    """The decoding metrics of a block-diffusion student; None for other students, or with several ranks."""
    student, teacher = components.student, components.teacher
    if not isinstance(student.reader, DiffusionReader):
        return None
    if not ranks.alone:
        logger.warning("no decoding metrics are measured: a student sharded over several ranks can't generate text yet")
        return None

    def judge(batch: Batch) -> BatchTargets:
        assert teacher is not None
        return thread.call(teacher.targets.fetch(batch, queries_of(batch, TargetSpec(("score",)))))

    ends = ends_of_text(student, components.tokenizer)
    return Decoding(settings.evaluation, batches, ends, judge if teacher is not None else None)
