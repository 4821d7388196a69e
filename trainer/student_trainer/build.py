"""Puts a run together: folder, teacher, data, student, optimizer, and where it left off. Called by `main` and `check`.

The order is that of what is likeliest to be wrong: whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import yaml

from student_trainer import randomness
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Kind
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import EVALUATION, ViewSeed
from student_trainer.checkpoint import checkpoints as checkpoint
from student_trainer.checkpoint.checkpoints import Checkpoints
from student_trainer.checkpoint.files import Snapshot, replace_text
from student_trainer.checkpoint.remote import RemoteCheckpoints
from student_trainer.checkpoint.resume import check_changes, check_student
from student_trainer.checkpoint.run_folder import SETTINGS_FILE, RunFolder, choose_folder, folder_of, sweep, take
from student_trainer.components import Parts, build_parts
from student_trainer.data.classification import class_words, one_set_of_words
from student_trainer.data.policies import BatchWeights, PolicyState
from student_trainer.data.stream import BatchStream
from student_trainer.data.tokenise import pad_id
from student_trainer.device import choose_device
from student_trainer.evaluation.evaluator import Evaluator, fetch_held_out
from student_trainer.evaluation.samples import SampleWriter
from student_trainer.loop import Run
from student_trainer.losses.kinds import all_terms
from student_trainer.losses.terms import Needs, Term
from student_trainer.losses.weighting import Weighting, weighting_of
from student_trainer.optim.optimizer import build_optimizer
from student_trainer.ranks import Ranks, open_ranks
from student_trainer.reporting.logs import RunLog, forget_after
from student_trainer.reporting.progress import Progress
from student_trainer.reporting.trackers import open_trackers
from student_trainer.rollouts.rollouts import RolloutStream
from student_trainer.rollouts.sampler import GenerateSampler, ends_of_text
from student_trainer.settings import Settings
from student_trainer.settings.redact import public
from student_trainer.state import TrainState
from student_trainer.students.compute import as_begun, name_compute
from student_trainer.students.identity import student_identity
from student_trainer.students.sharding import Unsharded, shard
from student_trainer.students.student import Student
from student_trainer.targets.attention import NO_TOKENS, BesideTokens
from student_trainer.targets.background import EventThread
from student_trainer.targets.guard import TargetGuard
from student_trainer.targets.prefetch import Prefetch, Stream
from student_trainer.targets.protocol import spec_for
from student_trainer.targets.student_support import StudentSupport
from teacher_proto.requests import TargetSpec
from teacher_proto.stages import stage
from teacher_proto.stopping import StopSignals

logger = logging.getLogger(__name__)


def build(settings: Settings, signals: StopSignals, stack: ExitStack) -> Run:
    """A run ready for `loop.train`; `stack` closes it. ValueError or StillhouseError if it can't be."""
    ranks = open_ranks(settings, stack)
    folder = _folder(settings, ranks)
    _tidy(folder, ranks, stack)
    remote = RemoteCheckpoints(settings.checkpoint, folder.id) if settings.checkpoint.url else None
    snapshot = _earlier(settings, folder, ranks, remote)
    if snapshot is not None:
        settings = as_begun(settings, snapshot.state["settings"])
    settings = name_compute(settings, choose_device(settings.run, ranks.local), ranks)
    thread = stack.enter_context(EventThread())
    parts = build_parts(settings, thread, stack, snapshot, ranks)
    identity = student_identity(parts.student.model, parts.tokenizer)
    if snapshot is not None:
        check_student(snapshot.state.get("student"), identity, settings)
    unsharded = Unsharded(parts.student, copied=not ranks.alone and _passes_alone(settings))
    shard(parts.student, ranks)
    losses = _losses(settings)
    optimizer = build_optimizer(settings.optim, parts.student.model, parts.student.head_module, settings.run.steps)
    state = TrainState(0, 0, parts.source.initial_state(), PolicyState.of(settings.data))
    randomness.seed_everything(settings.run.seed)
    if snapshot is not None:
        policy = state.policy.restored(snapshot.step, snapshot.state.get("mixture_policy"))
        state = replace(checkpoint.restore(snapshot, parts.student, optimizer), policy=policy)
        losses["data"] = losses["data"].restored(snapshot.state.get("balance"))
        state = replace(state, mixture=parts.source.resumed(state.mixture, snapshot.state.get("data") or {}))
        logger.info("resumed at step %d of %d", state.step, settings.run.steps)
    if ranks.first:
        # A run that was killed before its first save begins again, and so do its figures.
        forget_after(folder.path, state.step if snapshot is not None else -1)
        _write_settings(settings, folder)
    checkpoints = Checkpoints(
        folder.checkpoints, settings.checkpoint, _constant(settings, parts, identity, snapshot), ranks, remote
    )
    stack.callback(checkpoints.close)
    if snapshot is not None:
        checkpoints.resumed_at(state.step)
    guard = TargetGuard(settings.teacher, folder.dumps, parts.student.vocab_size, parts.reason, ranks)
    batch_weights = BatchWeights(state.policy)
    batches = stack.enter_context(BatchStream(parts.source, state.mixture, batch_weights))
    rollouts = _rollouts(settings, parts, unsharded.student, batches, snapshot, ranks)
    prefetch = _prefetch(settings, parts, losses, guard, rollouts or batches, thread, stack, ranks)
    evaluator = _evaluator(settings, parts, folder, thread, ranks)
    log = _log(settings, folder, state, ranks)
    return Run(
        settings=settings, ranks=ranks, student=parts.student, unsharded=unsharded, losses=losses,
        optimizer=optimizer, prefetch=prefetch, batch_weights=batch_weights, guard=guard, evaluator=evaluator,
        samples=_samples(settings, parts, ranks), checkpoints=checkpoints,
        log=stack.enter_context(log), signals=signals, state=state, rollouts=rollouts,
        student_support=_student_support(settings, parts, thread),
        waiting=parts.describe_waiting, compiles=settings.student.compile,
    )  # fmt: skip


def _losses(settings: Settings) -> dict[Kind, Weighting]:
    """The terms on each kind of batch that the run has."""
    losses: dict[Kind, Weighting] = {"data": weighting_of(settings.distillation)}
    if settings.on_policy.active:
        losses["rollout"] = weighting_of(settings.on_policy)
    return losses


def _passes_alone(settings: Settings) -> bool:
    """Whether a rank makes passes of the student that the others do not make with it."""
    return settings.on_policy.active or _gathers(settings) or bool(settings.distillation.balance.shares)


def _gathers(settings: Settings) -> bool:
    return bool(Needs.of(all_terms(settings)).late)


def _folder(settings: Settings, ranks: Ranks) -> RunFolder:
    """Chosen by rank 0 for all."""
    run_id = ""
    with ranks.sync_errors():
        if ranks.first:
            run_id = choose_folder(settings.run, has_copies=settings.checkpoint.url is not None).id
    return folder_of(settings.run, ranks.from_first(run_id))


def _tidy(folder: RunFolder, ranks: Ranks, stack: ExitStack) -> None:
    """Take the folder, on every disk that one lies on, and clear it of what killed processes left. Before any rank
    reads it or downloads into it.
    """
    with ranks.sync_errors():
        if ranks.local != 0:
            return
        if take(folder, stack):
            sweep(folder)
        elif ranks.first:
            logger.warning(
                "ANOTHER PROCESS THAT STILL RUNS HAS %s: if it trains the same run, end one of the two", folder.path
            )


def _earlier(settings: Settings, folder: RunFolder, ranks: Ranks, remote: RemoteCheckpoints | None) -> Snapshot | None:
    """The checkpoint to go on from, here or remote, if there is one and the settings want and allow it."""
    with ranks.sync_errors():
        if remote is not None and ranks.local == 0:
            with stage(f"looking for a later checkpoint in {remote.url}"):
                _fetch_later(settings, folder, remote, str(ranks.rank))
    if settings.run.resume == "never":
        return None
    with ranks.sync_errors(), stage("reading the newest checkpoint"):
        snapshot = checkpoint.newest(folder.checkpoints)
    step = -1 if snapshot is None else snapshot.step
    if ranks.largest(step) != -ranks.largest(-step):
        raise ValueError(
            f"the ranks do not find the same checkpoint in {folder.checkpoints}: put run.root on a file system that "
            "they share"
        )
    if snapshot is not None:
        check_changes(snapshot.state["settings"], as_begun(settings, snapshot.state["settings"]))
    elif settings.run.resume == "require":
        raise ValueError(f"{folder.checkpoints} holds no checkpoint, and run.resume is require")
    return snapshot


def _fetch_later(settings: Settings, folder: RunFolder, remote: RemoteCheckpoints, name: str) -> None:
    """A checkpoint that only the store has, or has later than this disk, into the run's folder."""
    if settings.run.resume == "never":
        if remote.steps():
            raise ValueError(f"{remote.url} holds a run, and run.resume is never: choose another run.id, or remove it")
        return
    here = checkpoint.newest_step(folder.checkpoints)
    try:
        remote.pull(folder.checkpoints, here, name)
    except OSError as error:
        if here < 0:
            raise
        logger.error("%s IS NOT ASKED FOR A LATER CHECKPOINT: %s. The run goes on from its own disk", remote.url, error)


def _write_settings(settings: Settings, folder: RunFolder) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.checkpoints.mkdir(exist_ok=True)
    replace_text(folder.path / SETTINGS_FILE, yaml.safe_dump(public(settings), sort_keys=False))


def _constant(settings: Settings, parts: Parts, student: dict[str, Any], snapshot: Snapshot | None) -> dict[str, Any]:
    """What every checkpoint of this process says alike. A run that goes on without its teacher remembers who it was."""
    before = snapshot.state.get("teacher") if snapshot is not None else None
    return {
        "settings": public(settings),
        "teacher": asdict(parts.teacher.card) if parts.teacher else before,
        "student": student,
        "data": parts.source.contents(),
    }


def _log(settings: Settings, folder: RunFolder, state: TrainState, ranks: Ranks) -> RunLog:
    if not ranks.first:
        return RunLog(None, Progress(settings.run.steps, state.step, "off"), ())
    progress = Progress(settings.run.steps, state.step, settings.logging.progress)
    return RunLog(folder.path, progress, open_trackers(settings, folder.id, folder.path))


def _rollouts(
    settings: Settings, parts: Parts, student: Student, batches: BatchStream, snapshot: Snapshot | None, ranks: Ranks
) -> RolloutStream | None:
    """The batches with those among them that the student writes, where the settings say so."""
    if not settings.on_policy.active:
        return None
    tokenizer = parts.tokenizer
    if not ends_of_text(student, tokenizer):
        raise ValueError(
            "neither tokenizer nor student names an end-of-text token, so what the student writes would never end: "
            "give the tokenizer an eos_token, or set on_policy.share=0"
        )
    if not student.autoregressive:
        raise ValueError(
            f"on_policy: a student of architecture {settings.student.architecture} does not write from left to right; "
            "set on_policy.share=0"
        )
    saved = snapshot.tensors.get(checkpoint.ROLLOUTS, {}) if snapshot is not None else {}
    sampler = _sampler(student, tokenizer, settings.on_policy.sequences_at_once)
    return RolloutStream(batches, settings, sampler, pad_id(tokenizer), saved, ranks)


def _prefetch(
    settings: Settings, parts: Parts, losses: Mapping[Kind, Weighting], guard: TargetGuard, stream: Stream,
    thread: EventThread, stack: ExitStack, ranks: Ranks,
) -> Prefetch:  # fmt: skip
    student, seed, rows = parts.student, ViewSeed(settings.run.seed), settings.optim.micro_batch_rows

    def prepare(batch: Batch, targets: BatchTargets | None) -> tuple[MicroBatch, ...]:
        parted = cut(batch, targets, student, seed, rows=rows, head=parts.head, keep_empty=not ranks.alone)
        return tuple(micro.to(student.device) for micro in parted)

    asked = {kind: _spec(settings, weighting.terms) for kind, weighting in losses.items()}
    targets = parts.teacher.targets if parts.teacher else None
    if targets is not None and parts.attention is not None:
        targets = BesideTokens(targets, parts.attention)
        asked["data"] = asked["data"] or NO_TOKENS
    return stack.enter_context(Prefetch(stream, targets, asked, thread, prepare, guard.refuse, settings.prefetch))


def _spec(settings: Settings, terms: Sequence[Term]) -> TargetSpec | None:
    """What is asked about a batch for these terms: nothing, without one that reads targets; evaluation still asks."""
    if not Needs.of(terms).kinds:
        return None
    return spec_for(terms, settings.teacher.top_k, settings.distillation)


def _sampler(student: Student, tokenizer: Any, at_once: int | None = None) -> GenerateSampler:
    return GenerateSampler(student, ends_of_text(student, tokenizer), pad_id(tokenizer), at_once)


def _held_out(settings: Settings, parts: Parts) -> dict[str, list[Batch]]:
    names = parts.source.names if settings.evaluation.every else ()
    with stage("reading the held-out documents"):
        return {name: group for name in names if (group := parts.source.held_out(name))}


def _samples(settings: Settings, parts: Parts, ranks: Ranks) -> SampleWriter:
    if not ranks.alone and settings.evaluation.every and settings.evaluation.samples:
        logger.warning("evaluation.samples has no effect: a student in shards on several ranks can't write yet")
    decode: Callable[[Sequence[int]], str] = lambda ids: str(parts.tokenizer.decode(ids))  # noqa: E731
    writes = parts.student.autoregressive
    if not writes and settings.evaluation.every and settings.evaluation.samples:
        architecture = settings.student.architecture
        logger.warning("evaluation.samples has no effect: architecture %s does not write left to right", architecture)
    held_out = _held_out(settings, parts) if ranks.alone and writes else {}
    return SampleWriter(settings.evaluation, held_out, _sampler(parts.student, parts.tokenizer), decode)


def _evaluator(settings: Settings, parts: Parts, folder: RunFolder, thread: EventThread, ranks: Ranks) -> Evaluator:
    batches = _held_out(settings, parts)
    spec = TargetSpec(("top_k",), settings.evaluation.top_k or settings.teacher.top_k)
    if settings.evaluation.kl == "full":
        spec = replace(spec, kinds=("top_k", "hidden"), hidden_dtype="float16")
    targets = parts.teacher.targets if parts.teacher else None
    held_out = fetch_held_out(batches, targets, thread, spec, parts.describe_waiting)
    decode: Callable[[int], str] = lambda token: str(parts.tokenizer.decode([token]))  # noqa: E731
    return Evaluator(
        settings.evaluation, held_out, settings.optim.micro_batch_rows, decode, folder.path / "passage.json",
        ViewSeed(settings.run.seed, EVALUATION), parts.head, class_words(settings.data, parts.tokenizer), ranks,
    )  # fmt: skip


def _student_support(settings: Settings, parts: Parts, thread: EventThread) -> StudentSupport | None:
    if parts.teacher is None or not _gathers(settings):
        return None
    asked = settings.distillation
    words = one_set_of_words(settings.data, parts.tokenizer) if asked.gather_at == "labels" else ()
    return StudentSupport(parts.teacher.targets, thread, asked.gather_k, words)
