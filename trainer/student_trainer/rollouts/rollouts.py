"""The stream of batches, some of which the student writes itself. Built by `build`, between the data and `prefetch`.

    batch n comes from the data -> its prompts -> the student, as it is after n - lag updates, writes -> targets are
    requested, while the next `lag` updates run -> update n learns from it

Nothing here depends on time: which batches are written, by which student and from which seeds follows from the settings
and the step alone. What has been written but not yet learnt from is kept in checkpoints.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.batch.batch import Batch
from student_trainer.data.mixture import MixtureState
from student_trainer.ranks import ALONE, Ranks
from student_trainer.rollouts.prompts import Prompt, is_rollout, prompts_of, rollout_batch
from student_trainer.rollouts.sampler import Passes, Sample, Sampler
from student_trainer.settings import Settings
from teacher_proto.process.stages import stage

logger = logging.getLogger(__name__)
Item = tuple[Batch | Future[Batch], MixtureState]
RowSample = tuple[int, Sample]  # the row over all ranks


@dataclass(frozen=True, eq=False)
class RolloutJob:
    """A batch that the student is to write; the result goes to `promise`."""

    batch: Batch
    prompts: tuple[Prompt, ...]
    promise: Future[Batch]


class RolloutStream:
    """An iterator of (batch or the promise of one, state after it), read by `prefetch`; `write` keeps the promises.

    `saved`: the result of `pending` when the run was saved, of all ranks by `concat`. Each of several ranks writes its
    own rows, and nothing if none of their documents gives a prompt; a single rank then learns from the data's text.
    """

    def __init__(
        self, stream: Iterator[tuple[Batch, MixtureState]], settings: Settings, sampler: Sampler, pad_id: int,
        saved: Mapping[str, Tensor], ranks: Ranks = ALONE,
    ):  # fmt: skip
        self._stream, self._sampler, self._pad_id, self._alone = stream, sampler, pad_id, ranks.alone
        rows = settings.data.rows // ranks.world
        self._first_row = ranks.rank * rows
        self._settings, self._seed, self._steps = settings.on_policy, settings.run.seed, settings.run.steps
        # Guards all of the following: `prefetch` reads on its own thread. Not held while a batch is read, which may
        # wait for mixture weights that the thread in `write` has yet to decide.
        self._changed = threading.Condition()
        self._reading = False
        self._ahead: deque[Item] = deque()  # read by `write`, not yet taken by `prefetch`
        self._reached = -1  # the last batch that was read
        self._written_to = 0  # `write` has been through all batches before this one
        self._jobs: dict[int, RolloutJob] = {}
        self._samples: dict[int, list[RowSample]] = _unpacked(saved, range(self._first_row, self._first_row + rows))

    def __iter__(self) -> RolloutStream:
        return self

    def __next__(self) -> Item:
        with self._changed:
            # Either `write` has read ahead and left batches here, or this thread reads the next one itself.
            self._changed.wait_for(lambda: self._ahead or not self._reading)
            if self._ahead:
                return self._ahead.popleft()
            self._reading = True
        return self._read(keep=False)

    def write(self, step: int, meanwhile: Callable[[], None]) -> float:
        """Let the student, after `step` updates, write what is due. Returns the seconds that it took.

        Due are batch step + lag and, at the start or resume of a run, those before it that no checkpoint holds.
        """
        started = time.monotonic()
        with self._changed:
            for number in [number for number in self._samples if number < step]:
                del self._samples[number]
                self._jobs.pop(number, None)
        with stage("writing rollouts", closing=False):
            for number in self._due(step):
                self._write(number, meanwhile)
        self._written_to = self._end(step)
        return time.monotonic() - started

    def due(self, step: int) -> bool:
        """Whether `write` may have something to write after `step` updates: the same on all ranks, whatever rows."""
        return bool(self._due(step))

    def is_rollout(self, number: int) -> bool:
        """Whether the student writes batch `number`."""
        return is_rollout(self._settings.share, self._seed, number)

    def _due(self, step: int) -> list[int]:
        return [number for number in range(max(step, self._written_to), self._end(step)) if self.is_rollout(number)]

    def _end(self, step: int) -> int:
        return min(step + self._settings.lag + 1, self._steps)

    def pending(self, step: int) -> dict[str, Tensor]:
        """What was written for update `step` and later ones, for a checkpoint."""
        with self._changed:
            return _packed({number: samples for number, samples in self._samples.items() if number >= step and samples})

    def _write(self, number: int, meanwhile: Callable[[], None]) -> None:
        self._read_up_to(number)
        with self._changed:
            job = self._jobs.get(number)
            if job is None or number in self._samples:  # it had no prompt, or was written already
                return
        samples = self._sampler.sample(
            [prompt.ids_N for prompt in job.prompts], [prompt.seed for prompt in job.prompts],
            new_tokens=self._settings.new_tokens, temperature=self._settings.temperature, meanwhile=meanwhile,
        )  # fmt: skip
        with self._changed:
            self._keep(job, samples)

    def _read_up_to(self, number: int) -> None:
        """Return once batch `number` has been read, by this thread or by that of `prefetch`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reached >= number or not self._reading)
                if self._reached >= number:
                    return
                self._reading = True
            self._read(keep=True)

    def _read(self, keep: bool) -> Item:
        """Read the next batch; only one thread reads at a time. `keep`: queue it for `prefetch` to take later."""
        try:
            batch, state = next(self._stream)
            with self._changed:
                item = self._item(batch), state
                if keep:
                    self._ahead.append(item)
                self._reached = batch.number
            return item
        finally:
            with self._changed:
                self._reading = False
                self._changed.notify_all()

    def _item(self, batch: Batch) -> Batch | Future[Batch]:
        if not self.is_rollout(batch.number):
            return batch
        prompts = prompts_of(batch, self._settings, self._seed, self._first_row)
        if not prompts and self._alone:
            logger.warning(
                "batch %d is used as it is, without rollouts: none of its %d documents gives a prompt that fits into a "
                "row with %d new tokens", batch.number, len(batch.documents), self._settings.new_tokens,
            )  # fmt: skip
            return batch
        job = self._jobs[batch.number] = RolloutJob(batch, prompts, Future())
        saved = self._samples.pop(batch.number, [])
        # In a resumed run, the samples of its checkpoint are the ones that were drawn for these prompts.
        if len(saved) == len(prompts):  # else the settings were changed: it is written again
            self._keep(job, [sample for _, sample in saved])
        return job.promise

    def _keep(self, job: RolloutJob, samples: list[Sample]) -> None:
        rows = [self._first_row + prompt.row for prompt in job.prompts]
        self._samples[job.batch.number] = list(zip(rows, samples, strict=True))
        job.promise.set_result(rollout_batch(job.batch, job.prompts, samples, self._pad_id))


def concat(ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks have `pending`, as a single rank would have it."""
    names = dict.fromkeys(name for tensors in ranks for name in tensors)
    return {name: torch.cat([tensors[name] for tensors in ranks if name in tensors]) for name in names}


def _packed(samples: Mapping[int, list[RowSample]]) -> dict[str, Tensor]:
    tensors = {}
    for number, placed in samples.items():
        rows, group = zip(*placed, strict=True)
        tensors[f"{number}.rows"] = torch.tensor(rows)
        tensors[f"{number}.tokens"] = torch.from_numpy(np.concatenate([sample.ids_N for sample in group]))
        tensors[f"{number}.lengths"] = torch.tensor([len(sample.ids_N) for sample in group])
        tensors[f"{number}.ended"] = torch.tensor([sample.ended for sample in group])
        tensors[f"{number}.logprobs"] = torch.tensor([sample.logprob for sample in group], dtype=torch.float64)
        # For a student that writes several tokens at a time.
        written = [sample.written_at_N for sample in group if sample.written_at_N is not None]
        passes = [astuple(sample.passes) for sample in group if sample.passes is not None]
        if len(written) == len(passes) == len(group):
            tensors[f"{number}.written_at"] = torch.from_numpy(np.concatenate(written))
            tensors[f"{number}.passes"] = torch.tensor(passes)
    return tensors


def _unpacked(tensors: Mapping[str, Tensor], rows: range) -> dict[int, list[RowSample]]:
    """The samples of these rows."""
    samples = {}
    for number in sorted({int(name.partition(".")[0]) for name in tensors}):
        row, lengths, ended, logprobs = (
            tensors[f"{number}.{part}"].tolist() for part in ("rows", "lengths", "ended", "logprobs")
        )
        pieces = torch.split(tensors[f"{number}.tokens"], lengths)
        every = zip(row, pieces, ended, logprobs, _ways(tensors, number, lengths), strict=True)
        samples[number] = [
            (at, Sample(ids_N.numpy(), end, value, *way)) for at, ids_N, end, value, way in every if at in rows
        ]
    return samples


def _ways(tensors: Mapping[str, Tensor], number: int, lengths: list[int]) -> list[tuple[Any, ...]]:
    """By sample, when its tokens were written and in how many passes, if that was kept."""
    if f"{number}.written_at" not in tensors:
        return [()] * len(lengths)
    written = torch.split(tensors[f"{number}.written_at"], lengths)
    passes = [Passes(*counts) for counts in tensors[f"{number}.passes"].tolist()]
    return [(at_N.numpy(), took) for at_N, took in zip(written, passes, strict=True)]
