"""The held-out rows with their targets, which are fetched once, so that all evaluations compare with the same ones.
Called by `open`, read by `evaluator`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.targets.background import EventThread
from student_trainer.targets.protocol import Targets
from student_trainer.targets.queries import queries_of
from teacher_proto.process.stages import stage
from teacher_proto.requests import TargetSpec


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out rows of all sources, with their targets."""

    batches: Mapping[str, Sequence[Batch]]
    targets: Mapping[str, Sequence[BatchTargets | None]]


def fetch_held_out(
    batches: Mapping[str, Sequence[Batch]], targets: Targets | None, thread: EventThread, spec: TargetSpec,
    waiting: Callable[[], str] = str,
) -> HeldOut:  # fmt: skip
    """Fetch the targets of all batches concurrently; raises the first failure. `waiting` describes the progress."""
    if targets is None:
        return HeldOut(batches, {name: [None] * len(group) for name, group in batches.items()})
    ordered = [batch for group in batches.values() for batch in group]

    with stage("held-out targets", len(ordered), "batches", note=waiting, paced=False) as doing:

        async def fetch(batch: Batch) -> BatchTargets:
            answer = await targets.fetch(batch, queries_of(batch, spec))
            doing.done += 1
            return answer

        async def fetch_all() -> list[BatchTargets]:
            return await asyncio.gather(*map(fetch, ordered))

        answers = iter(thread.call(fetch_all()))
    return HeldOut(batches, {name: [next(answers) for _ in group] for name, group in batches.items()})
