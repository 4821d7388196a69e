"""Puts a run together: folder, teacher, data, student, optimizer, and where it left off. Called by `main` and `check`.

The order is that of what is likeliest to be wrong: whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from student_trainer import randomness
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Kind
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import EVALUATION, ViewSeed
from student_trainer.build_components import build_components
from student_trainer.calibration.start import calibrate_at_start
from student_trainer.checkpoint import checkpoints as checkpoint
from student_trainer.checkpoint.checkpoints import Checkpoints
from student_trainer.checkpoint.earlier_run import recognised
from student_trainer.checkpoint.files import Snapshot
from student_trainer.checkpoint.remote import RemoteCheckpoints
from student_trainer.checkpoint.resume import check_student
from student_trainer.checkpoint.run_folder import RunFolder, find_earlier, open_folder, write_settings
from student_trainer.components import Components
from student_trainer.data.ahead import documents_ahead
from student_trainer.data.classification import class_words, one_set_of_words
from student_trainer.data.loader import BatchSource
from student_trainer.data.policies.decisions import BatchWeights, PolicyState
from student_trainer.data.stream import BatchStream
from student_trainer.data.tokenise import pad_id
from student_trainer.device import choose_device
from student_trainer.evaluation.decoding import Decoding
from student_trainer.evaluation.evaluator import Evaluator, fetch_held_out
from student_trainer.evaluation.influence import InfluenceMeter, NoMeter
from student_trainer.evaluation.samples import SampleWriter
from student_trainer.loop import Run
from student_trainer.losses.kinds import all_terms, terms_of
from student_trainer.losses.terms import Needs, TeacherTerm, Term
from student_trainer.losses.watched import watched_terms
from student_trainer.losses.weighting import Weighting, weighting_of
from student_trainer.optim.optimizer import Optimizer, build_optimizer
from student_trainer.ranks import Ranks, open_ranks
from student_trainer.reporting.logs import RunLog, forget_after
from student_trainer.reporting.progress import Progress
from student_trainer.reporting.trackers import open_trackers
from student_trainer.rollouts.block_sampler import sampler_of
from student_trainer.rollouts.rollouts import RolloutStream
from student_trainer.rollouts.sampler import Sampler, ends_of_text
from student_trainer.settings import Settings
from student_trainer.settings.mixture import InfluenceMixture
from student_trainer.settings.redact import public
from student_trainer.state import TrainState
from student_trainer.students.compute import as_begun, name_compute
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.identity import student_identity
from student_trainer.students.sharding import Unsharded, shard
from student_trainer.students.student import Student
from student_trainer.targets.attention import NO_TOKENS, BesideTokens
from student_trainer.targets.background import EventThread
from student_trainer.targets.cached import CachedTargets
from student_trainer.targets.guard import TargetGuard
from student_trainer.targets.lookahead import Lookahead
from student_trainer.targets.missing import list_missing
from student_trainer.targets.prefetch import Prefetch, Ready, Stream
from student_trainer.targets.protocol import Targets, spec_for
from student_trainer.targets.queries import queries_of
from student_trainer.targets.student_support import StudentSupport
from teacher_proto.process.stages import stage
from teacher_proto.process.stopping import StopSignals
from teacher_proto.requests import TargetSpec

logger = logging.getLogger(__name__)


def build(settings: Settings, signals: StopSignals, stack: ExitStack) -> Run:
    """A run ready for `loop.train`; `stack` closes it. ValueError or StillhouseError if it can't be."""
    settings = recognised(settings)
    ranks = open_ranks(settings, stack)
    folder = open_folder(settings, ranks, stack)
    remote = RemoteCheckpoints(settings.checkpoint, folder.id) if settings.checkpoint.url else None
    snapshot = find_earlier(settings, folder, ranks, remote)
    if snapshot is not None:
        settings = as_begun(settings, snapshot.state["settings"])
    settings = name_compute(settings, choose_device(settings.run, ranks.local), ranks)
    thread = stack.enter_context(EventThread())
    components = build_components(settings, thread, stack, snapshot, ranks)
    identity = student_identity(components.student.model, components.tokenizer)
    if snapshot is not None:
        check_student(snapshot.state.get("student"), identity, settings)
    elif isinstance(settings.data.mixture, InfluenceMixture):
        components.source.check_probe(settings.data.probe)
    if snapshot is None:
        student, source = components.student, components.source
        calibrate_at_start(settings, student, source, identity, folder.path, ranks)
    unsharded = Unsharded(components.student, copied=not ranks.alone and _passes_alone(settings))
    shard(components.student, ranks)
    policy = PolicyState.of(settings.data)
    losses = _losses(settings, policy.policy.watches)
    optimizer = build_optimizer(
        settings.optim, components.student.model, components.student.head_module, settings.run.steps
    )
    state = TrainState(0, 0, components.source.initial_state(), policy)
    randomness.seed_everything(settings.run.seed)
    if snapshot is not None:
        policy = state.policy.restored(snapshot.step, snapshot.state.get("mixture_policy"))
        state = replace(checkpoint.restore(snapshot, components.student, optimizer), policy=policy)
        losses["data"] = losses["data"].restored(snapshot.state.get("balance"))
        state = replace(state, mixture=components.source.resumed(state.mixture, snapshot.state.get("data") or {}))
        logger.info("resumed at step %d of %d", state.step, settings.run.steps)
    if ranks.first:
        # A run that was killed before its first save begins again, and so do its figures.
        forget_after(folder.path, state.step if snapshot is not None else -1)
        write_settings(settings, folder)
    checkpoints = Checkpoints(
        folder.checkpoints, settings.checkpoint, _constant(settings, components, identity, snapshot), ranks, remote
    )
    stack.callback(checkpoints.close)
    if snapshot is not None:
        checkpoints.resumed_at(state.step)
    if ranks.first:
        _list_missing(settings, components, losses["data"], state, folder)
    guard = TargetGuard(settings.teacher, folder.dumps, components.student.vocab_size, components.reason, ranks)
    batch_weights = BatchWeights(state.policy)
    batches = stack.enter_context(BatchStream(components.source, state.mixture, batch_weights))
    rollouts = _rollouts(settings, components, unsharded.student, batches, snapshot, ranks)
    prefetch = _prefetch(settings, components, losses, guard, rollouts or batches, thread, stack, ranks)
    evaluator = _evaluator(settings, components, folder, thread, ranks)
    meter = _meter(settings, components, losses, optimizer, state, thread, ranks)
    log = _log(settings, folder, state, ranks)
    return Run(
        settings=settings, ranks=ranks, student=components.student, unsharded=unsharded, losses=losses,
        optimizer=optimizer, prefetch=prefetch, batch_weights=batch_weights, guard=guard, evaluator=evaluator,
        meter=meter, samples=_samples(settings, components, ranks), checkpoints=checkpoints,
        log=stack.enter_context(log), signals=signals, state=state, rollouts=rollouts,
        student_support=_student_support(settings, components, thread),
        lookahead=_lookahead(settings, components, thread),
        waiting=components.describe_waiting, compiles=settings.student.compile,
    )  # fmt: skip


def _losses(settings: Settings, watched: Sequence[str]) -> dict[Kind, Weighting]:
    """The terms on each kind of batch that the run has; on the data's own, with what the mixture goes by."""
    data = weighting_of(settings.distillation)
    data = replace(data, watched=watched_terms(watched, settings.distillation.by_name()))
    losses: dict[Kind, Weighting] = {"data": data}
    if settings.on_policy.active:
        losses["rollout"] = weighting_of(settings.on_policy)
    return losses


def _list_missing(
    settings: Settings, components: Components, weighting: Weighting, state: TrainState, folder: RunFolder
) -> None:
    """Say which documents of the rest of the run a target dataset lacks, before anything is computed."""
    targets = components.teacher.targets if components.teacher else None
    if not isinstance(targets, CachedTargets) or targets.dataset is None or not settings.teacher.list_missing:
        return
    if state.policy.policy.varies:
        logger.info("teacher.list_missing has no effect: the losses decide which documents this run draws")
        return
    specs = [spec for spec in (_spec(settings, weighting.terms),) if spec is not None]
    if settings.evaluation.every:
        specs.append(_evaluation_spec(settings))
    # Of its own, so that the run's counters begin with the run.
    source = BatchSource(settings.data, components.tokenizer, settings.run.seed)
    try:
        documents = documents_ahead(
            source, state.mixture, settings.run.steps - state.step, settings.evaluation.every > 0
        )
        list_missing(targets, documents, specs, folder.path / "missing.jsonl")
    finally:
        source.close()


def _passes_alone(settings: Settings) -> bool:
    """Whether a rank makes passes of the student that the others do not make with it."""
    looks_ahead = settings.distillation.lookahead.window is not None
    return settings.on_policy.active or _gathers(settings) or looks_ahead or bool(settings.distillation.balance.shares)


def _gathers(settings: Settings) -> bool:
    return bool(Needs.of(all_terms(settings)).late)


def _constant(
    settings: Settings, components: Components, student: dict[str, Any], snapshot: Snapshot | None
) -> dict[str, Any]:
    """What every checkpoint of this process says alike. A run that goes on without its teacher remembers who it was."""
    before = snapshot.state.get("teacher") if snapshot is not None else None
    return {
        "settings": public(settings),
        "teacher": asdict(components.teacher.card) if components.teacher else before,
        "student": student,
        "data": components.source.contents(),
    }


def _log(settings: Settings, folder: RunFolder, state: TrainState, ranks: Ranks) -> RunLog:
    if not ranks.first:
        return RunLog(None, Progress(settings.run.steps, state.step, "off"), ())
    progress = Progress(settings.run.steps, state.step, settings.logging.progress)
    return RunLog(folder.path, progress, open_trackers(settings, folder.id, folder.path))


def _rollouts(
    settings: Settings,
    components: Components,
    student: Student,
    batches: BatchStream,
    snapshot: Snapshot | None,
    ranks: Ranks,
) -> RolloutStream | None:
    """The batches with those among them that the student writes, where the settings say so."""
    if not settings.on_policy.active:
        return None
    tokenizer = components.tokenizer
    if not ends_of_text(student, tokenizer):
        raise ValueError(
            "neither tokenizer nor student names an end-of-text token, so what the student writes would never end: "
            "give the tokenizer an eos_token, or set on_policy.share=0"
        )
    sampler = _sampler(student, tokenizer, settings.on_policy.sequences_at_once)
    if sampler is None:
        raise ValueError(
            f"on_policy: a student of architecture {settings.student.architecture} does not write from left to right, "
            "and in no other way that is known here; set on_policy.share=0"
        )
    saved = snapshot.tensors.get(checkpoint.ROLLOUTS, {}) if snapshot is not None else {}
    return RolloutStream(batches, settings, sampler, pad_id(tokenizer), saved, ranks)


def _prefetch(
    settings: Settings, components: Components, losses: Mapping[Kind, Weighting], guard: TargetGuard, stream: Stream,
    thread: EventThread, stack: ExitStack, ranks: Ranks,
) -> Prefetch:  # fmt: skip
    student, seed, rows = components.student, ViewSeed(settings.run.seed), settings.optim.micro_batch_rows

    def prepare(batch: Batch, targets: BatchTargets | None) -> tuple[MicroBatch, ...]:
        parted = cut(batch, targets, student, seed, rows=rows, head=components.head, keep_empty=not ranks.alone)
        return tuple(micro.to(student.device) for micro in parted)

    targets, asked = _asked(settings, components, losses)
    return stack.enter_context(Prefetch(stream, targets, asked, thread, prepare, guard.refuse, settings.prefetch))


def _asked(
    settings: Settings, components: Components, losses: Mapping[Kind, Weighting]
) -> tuple[Targets | None, dict[Kind, TargetSpec | None]]:
    """Who answers for the run's batches, and what is asked about those of each kind."""
    asked = {kind: _spec(settings, weighting.terms + weighting.watched) for kind, weighting in losses.items()}
    targets = components.teacher.targets if components.teacher else None
    if targets is not None and components.attention is not None:
        targets = BesideTokens(targets, components.attention)
        asked["data"] = asked["data"] or NO_TOKENS
    return targets, asked


def _meter(
    settings: Settings, components: Components, losses: Mapping[Kind, Weighting], optimizer: Optimizer,
    state: TrainState, thread: EventThread, ranks: Ranks,
) -> NoMeter:  # fmt: skip
    """What measures gradients for the mixture, where it goes by them."""
    mixture, source, student = settings.data.mixture, components.source, components.student
    if not isinstance(mixture, InfluenceMixture):
        return NoMeter()
    targets, asked = _asked(settings, components, losses)
    spec, batches = asked["data"], {name: source.held_out(name) for name in settings.data.probe}
    held_out = fetch_held_out(
        batches, targets if spec else None, thread, spec or NO_TOKENS, components.describe_waiting
    )
    probe = [
        Ready(batch, state.mixture, answer, cut(
            batch, answer, student, ViewSeed(settings.run.seed, EVALUATION), rows=settings.optim.micro_batch_rows,
            head=components.head, keep_empty=not ranks.alone))
        for name in batches for batch, answer in zip(batches[name], held_out.targets[name], strict=True)
    ]  # fmt: skip
    return InfluenceMeter(settings, student, optimizer, source.names, probe, ranks)


def _spec(settings: Settings, terms: Sequence[Term]) -> TargetSpec | None:
    """What is asked about a batch for these terms: nothing, without one that reads targets; evaluation still asks."""
    if not Needs.of(terms).kinds:
        return None
    return spec_for(terms, settings.teacher.top_k, settings.distillation)


def _sampler(student: Student, tokenizer: Any, at_once: int | None = None) -> Sampler | None:
    return sampler_of(student, ends_of_text(student, tokenizer), pad_id(tokenizer), at_once)


def _held_out(settings: Settings, components: Components) -> dict[str, list[Batch]]:
    names = components.source.names if settings.evaluation.every else ()
    with stage("reading the held-out documents"):
        return {name: group for name in names if (group := components.source.held_out(name))}


def _samples(settings: Settings, components: Components, ranks: Ranks) -> SampleWriter:
    if not ranks.alone and settings.evaluation.every and settings.evaluation.samples:
        logger.warning("evaluation.samples has no effect: a student in shards on several ranks can't write yet")
    decode: Callable[[Sequence[int]], str] = lambda ids: str(components.tokenizer.decode(ids))  # noqa: E731
    sampler = _sampler(components.student, components.tokenizer)
    if sampler is None and settings.evaluation.every and settings.evaluation.samples:
        architecture = settings.student.architecture
        logger.warning("evaluation.samples has no effect: architecture %s does not write left to right", architecture)
    held_out = _held_out(settings, components) if ranks.alone and sampler else {}
    return SampleWriter(settings.evaluation, held_out, sampler, decode)


def _evaluator(
    settings: Settings, components: Components, folder: RunFolder, thread: EventThread, ranks: Ranks
) -> Evaluator:
    batches = _held_out(settings, components)
    spec = _evaluation_spec(settings)
    targets = components.teacher.targets if components.teacher else None
    held_out = fetch_held_out(batches, targets, thread, spec, components.describe_waiting)
    decode: Callable[[Sequence[int]], str] = lambda ids: str(components.tokenizer.decode(ids))  # noqa: E731
    return Evaluator(
        settings.evaluation, held_out, settings.optim.micro_batch_rows, decode, folder.path / "passage.json",
        ViewSeed(settings.run.seed, EVALUATION), components.head, class_words(settings.data, components.tokenizer),
        ranks, _decoding(settings, components, batches, thread, ranks),
    )  # fmt: skip


def _evaluation_spec(settings: Settings) -> TargetSpec:
    spec = TargetSpec(("top_k",), settings.evaluation.top_k or settings.teacher.top_k)
    if settings.evaluation.kl == "full":
        spec = replace(spec, kinds=("top_k", "hidden"), hidden_dtype="float16")
    return spec


def _decoding(
    settings: Settings, components: Components, batches: Mapping[str, Sequence[Batch]], thread: EventThread,
    ranks: Ranks,
) -> Decoding | None:  # fmt: skip
    """Figures of what a block-diffusion student fills in and writes."""
    student, teacher = components.student, components.teacher
    if not isinstance(student.reader, DiffusionReader):
        return None
    if not ranks.alone:
        logger.warning("nothing is filled in for figures: a student in shards on several ranks can't write yet")
        return None

    def judge(batch: Batch) -> BatchTargets:
        assert teacher is not None
        return thread.call(teacher.targets.fetch(batch, queries_of(batch, TargetSpec(("score",)))))

    ends = ends_of_text(student, components.tokenizer)
    return Decoding(settings.evaluation, batches, ends, judge if teacher is not None else None)


def _lookahead(settings: Settings, components: Components, thread: EventThread) -> Lookahead | None:
    """ValueError where there is nobody to ask, or nothing that may be looked ahead of."""
    wanted, teacher = settings.distillation.lookahead, components.teacher
    if wanted.window is None:
        return None
    if components.student.autoregressive:
        raise ValueError(
            "distillation.lookahead.window is set, but the student predicts a token from what stands before it alone: "
            "what follows tells it nothing; use student=diffusion, or leave it out"
        )
    if teacher is None or "score" not in teacher.card.kinds:
        who = "there is no teacher" if teacher is None else f"the teacher {teacher.card.name} has no kind score"
        raise ValueError(f"distillation.lookahead.window is set, but {who}: leave it out")
    if wanted.candidates > settings.teacher.top_k:
        raise ValueError(
            f"distillation.lookahead.candidates is {wanted.candidates}, teacher.top_k is {settings.teacher.top_k}: "
            "candidates come out of the teacher's top K, give fewer"
        )
    if not any(isinstance(term, TeacherTerm) for term in terms_of(settings.distillation)):
        raise ValueError("distillation.lookahead.window is set, but no loss compares with the teacher's top K")
    return Lookahead(teacher.targets, thread, wanted, settings.run.seed)


def _student_support(settings: Settings, components: Components, thread: EventThread) -> StudentSupport | None:
    if components.teacher is None or not _gathers(settings):
        return None
    asked = settings.distillation
    words = one_set_of_words(settings.data, components.tokenizer) if asked.gather_at == "labels" else ()
    return StudentSupport(components.teacher.targets, thread, asked.gather_k, words)
