"""Builds a run from its settings: folder, teacher, data, student, optimizer, and the state to resume. Called by `main`.

What is most likely to be wrong comes first: whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from student_trainer import randomness
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Kind
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import ViewSeed
from student_trainer.build_components import build_components
from student_trainer.calibration.start import calibrate_at_start
from student_trainer.checkpoint.checkpoints import ROLLOUTS, Checkpoints, restore
from student_trainer.checkpoint.earlier_run import recognised
from student_trainer.checkpoint.files import Snapshot
from student_trainer.checkpoint.remote import RemoteCheckpoints
from student_trainer.checkpoint.resume import check_student
from student_trainer.checkpoint.run_folder import RunFolder, find_earlier, open_folder, write_settings
from student_trainer.components import Components
from student_trainer.data.policies.decisions import BatchWeights, PolicyState
from student_trainer.data.stream import BatchStream
from student_trainer.device import choose_device
from student_trainer.evaluation.open import open_evaluator, open_meter, open_samples
from student_trainer.losses.weighting import Weighting, weightings
from student_trainer.optim.optimizer import Optimizer, build_optimizer
from student_trainer.ranks import Ranks, open_ranks
from student_trainer.reporting.logs import forget_after, open_log
from student_trainer.rollouts.open import open_rollouts
from student_trainer.run import Run
from student_trainer.settings import Settings
from student_trainer.settings.redact import public
from student_trainer.state import TrainState
from student_trainer.students.compute import as_begun, name_compute
from student_trainer.students.identity import student_identity
from student_trainer.students.sharding import Unsharded, shard
from student_trainer.targets.background import EventThread
from student_trainer.targets.guard import TargetGuard
from student_trainer.targets.late import asks_late, open_late
from student_trainer.targets.missing import list_missing
from student_trainer.targets.prefetch import Prefetch, Stream
from student_trainer.targets.protocol import held_out_spec, spec_for
from teacher_proto.process.stopping import StopSignals

logger = logging.getLogger(__name__)
Losses = dict[Kind, Weighting]


def build(settings: Settings, signals: StopSignals, stack: ExitStack) -> Run:
    """A run ready for `loop.train`; `stack` closes it. ValueError or StillhouseError if it cannot be built."""
    settings = recognised(settings)
    ranks = open_ranks(settings, stack)
    folder = open_folder(settings, ranks, stack)
    remote = RemoteCheckpoints(settings.checkpoint, folder.id) if settings.checkpoint.url else None
    snapshot = find_earlier(settings, folder, ranks, remote)
    settings = settings if snapshot is None else as_begun(settings, snapshot.state["settings"])
    settings = name_compute(settings, choose_device(settings.run, ranks.local), ranks)
    thread = stack.enter_context(EventThread())
    components = build_components(settings, thread, stack, snapshot, ranks)
    student, source, tokenizer = components.student, components.source, components.tokenizer
    identity = student_identity(student.model, tokenizer)
    if snapshot is not None:
        check_student(snapshot.state.get("student"), identity, settings)
    else:
        source.check_probe()
        calibrate_at_start(settings, student, source, identity, folder.path, ranks)
    # Before sharding, since it is a copy of the whole student.
    unsharded = Unsharded(student, copied=not ranks.alone and _passes_alone(settings))
    shard(student, ranks)
    # After `shard`, which replaces the parameters.
    optimizer = build_optimizer(settings.optim, student.model, student.head_module, settings.run.steps)
    losses, state = _state(settings, components, optimizer, snapshot)
    if ranks.first:
        _prepare_folder(settings, components, losses, state, folder, resumed=snapshot is not None)
    constant = _constant(settings, components, identity, snapshot)
    checkpoints = Checkpoints(folder.checkpoints, settings.checkpoint, constant, ranks, remote)
    stack.callback(checkpoints.close)
    if snapshot is not None:
        checkpoints.resumed_at(state.step)
    guard = TargetGuard(settings.teacher, folder.dumps, student.vocab_size, components.reason, ranks)
    weights = BatchWeights(state.policy)
    batches = stack.enter_context(BatchStream(source, state.mixture, weights))
    saved = snapshot.tensors.get(ROLLOUTS, {}) if snapshot is not None else {}
    rollouts = open_rollouts(settings, unsharded.student, tokenizer, batches, saved, ranks)
    stream, steps = rollouts or batches, settings.run.steps - state.step
    prefetch = stack.enter_context(_prefetch(settings, components, losses, guard, stream, steps, thread, ranks))
    evaluator = open_evaluator(settings, components, folder.path, thread, ranks)
    meter = open_meter(settings, components, losses["data"], optimizer, state, thread, ranks)
    log = stack.enter_context(open_log(settings, folder.id, folder.path, state.step, ranks))
    return Run(
        settings=settings, ranks=ranks, student=student, unsharded=unsharded, losses=losses, optimizer=optimizer,
        prefetch=prefetch, batch_weights=weights, guard=guard, evaluator=evaluator, meter=meter,
        samples=open_samples(settings, components, ranks), checkpoints=checkpoints, log=log, signals=signals,
        late=open_late(settings, student, components.teacher, tokenizer, thread), state=state, rollouts=rollouts,
        waiting=components.describe_waiting, compiles=settings.student.compile,
    )  # fmt: skip


def _passes_alone(settings: Settings) -> bool:
    """Whether a rank makes passes of the student that the other ranks do not take part in."""
    return settings.on_policy.active or asks_late(settings) or bool(settings.distillation.balance.shares)


def _state(
    settings: Settings, components: Components, optimizer: Optimizer, snapshot: Snapshot | None
) -> tuple[Losses, TrainState]:
    """The loss on each kind of batch, and the run's state: a fresh one, or that of `snapshot`, which is also restored
    into student and optimizer.
    """
    policy = PolicyState.of(settings.data)
    losses = weightings(settings, policy.policy.watches)
    randomness.seed_everything(settings.run.seed)
    if snapshot is None:
        return losses, TrainState(0, 0, components.source.initial_state(), policy)
    policy = policy.restored(snapshot.step, snapshot.state.get("mixture_policy"))
    state = replace(restore(snapshot, components.student, optimizer), policy=policy)
    losses["data"] = losses["data"].restored(snapshot.state.get("balance"))
    mixture = components.source.resumed(state.mixture, snapshot.state.get("data") or {})
    logger.info("resumed at step %d of %d", state.step, settings.run.steps)
    return losses, replace(state, mixture=mixture)


def _prepare_folder(
    settings: Settings, components: Components, losses: Losses, state: TrainState, folder: RunFolder, resumed: bool
) -> None:
    """Write the settings, drop metrics of steps after `state`, and look for missing targets: MissingTargetsError."""
    # A run that was killed before its first save starts again, and so do its metrics.
    forget_after(folder.path, state.step if resumed else -1)
    write_settings(settings, folder)
    asked = spec_for(losses["data"].terms, settings.teacher.top_k, settings.distillation)
    specs = [*([asked] if asked else []), *([held_out_spec(settings)] if settings.evaluation.every else [])]
    targets = components.teacher.targets if components.teacher else None
    list_missing(settings, targets, specs, components.tokenizer, state, folder.path)


def _constant(
    settings: Settings, components: Components, student: dict[str, Any], snapshot: Snapshot | None
) -> dict[str, Any]:
    """What is the same in all checkpoints of this process. A run resumed without a teacher keeps the teacher's card."""
    before = snapshot.state.get("teacher") if snapshot is not None else None
    return {
        "settings": public(settings),
        "teacher": asdict(components.teacher.card) if components.teacher else before,
        "student": student,
        "data": components.source.contents(),
    }


def _prefetch(
    settings: Settings, components: Components, losses: Mapping[Kind, Weighting], guard: TargetGuard, stream: Stream,
    steps: int, thread: EventThread, ranks: Ranks,
) -> Prefetch:  # fmt: skip
    """Prefetches the stream's batches with their targets, cut into micro batches on the student's device."""
    student, seed, rows = components.student, ViewSeed(settings.run.seed), settings.optim.micro_batch_rows

    def prepare(batch: Batch, targets: BatchTargets | None) -> tuple[MicroBatch, ...]:
        parted = cut(batch, targets, student, seed, rows=rows, head=components.head, keep_empty=not ranks.alone)
        return tuple(micro.to(student.device) for micro in parted)

    asked = {kind: components.spec(settings, each.terms + each.watched, kind) for kind, each in losses.items()}
    return Prefetch(stream, steps, components.targets, asked, thread, prepare, guard.refuse, settings.prefetch)
