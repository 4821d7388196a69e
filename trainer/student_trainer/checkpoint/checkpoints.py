"""Saving and restoring everything that the next update depends on, bit for bit. Used by `loop` and `build`.

Saved: latent weights and buffers, optimizer state, random states, step, tokens, the mixture's state, the teacher's
identity, the settings, the wire format's version. The schedule is a function of the step, and each batch is a function
of its number, so neither these nor prefetched batches need saving. `files` writes on a background thread.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from student_trainer import randomness
from student_trainer.checkpoint import files
from student_trainer.checkpoint.files import DamagedError, Snapshot
from student_trainer.checkpoint.remote import RemoteCheckpoints
from student_trainer.checkpoint.sharded import ShardedWriter
from student_trainer.data.mixture import MixtureState
from student_trainer.ranks import ALONE, RankError, Ranks, like
from student_trainer.settings import CheckpointSettings
from student_trainer.state import TrainState
from teacher_proto.process.stages import stage
from teacher_proto.process.stopping import finishing
from teacher_proto.wire.responses import VERSION as WIRE_VERSION

logger = logging.getLogger(__name__)
LATEST = "latest"
ROLLOUTS = "written"  # the file's name


class HasTensors(Protocol):
    """A student: its latent weights and buffers by name."""

    def tensors(self) -> dict[str, Tensor]: ...


class HasState(Protocol):
    """An optimizer: every tensor that its next step depends on."""

    def state(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


class Checkpoints:
    """The checkpoints of one run in `root`. `constant` is the state that all share: settings, teacher identity.

    With several `ranks`, all call the same methods at the same step, and each writes its own shard (`sharded`); the
    result loads on any number of ranks. `remote` receives a copy of each checkpoint.
    """

    def __init__(
        self, root: Path, settings: CheckpointSettings, constant: dict[str, Any], ranks: Ranks = ALONE,
        remote: RemoteCheckpoints | None = None,
    ):  # fmt: skip
        self._root, self._settings, self._constant, self._ranks = root, settings, constant, ranks
        self._remote = remote
        self._sharded = None if ranks.alone else ShardedWriter(ranks)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._saved_step: int | None = None
        self._closed = False

    def due(self, step: int, steps: int) -> bool:
        """Every `every` steps, and always at the end."""
        return step == steps or (self._settings.every > 0 and step % self._settings.every == 0)

    def save(
        self, state: TrainState, student: HasTensors, optimizer: HasState, rollouts: Mapping[str, Tensor] | None = None,
        balance: Mapping[str, Any] | None = None, random: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        """Copy the state now and write it in the background. Waits for the previous save and reports its failure.

        `rollouts`: text that the student wrote and has not been trained on yet. `balance`: the state of the terms'
        weighting. `random`: an earlier result of `randomness.capture`; without it, the random state is captured now.
        """
        with self._ranks.sync_errors():
            self.finish()
        # All ranks must agree on this: a save is a collective.
        if self._ranks.largest(self._ranks.first and self._saved_step == state.step):
            return
        random_tensors, random_plain = random or randomness.capture()
        tensors = {"random": random_tensors, **({ROLLOUTS: rollouts} if rollouts else {})}
        plain = {
            "step": state.step,
            "tokens": state.tokens,
            "mixture": state.mixture.to_json(),
            "mixture_policy": state.policy.to_json(),
            "random": random_plain,
            "balance": balance,
            "wire_version": WIRE_VERSION,
            **self._constant,
        }
        # Copied here, before the next update changes the tensors; the thread writes the copies.
        model, states = student.tensors(), optimizer.state()
        if self._sharded is None:
            whole = {"model": _copied(model), "optimizer": _copied(states)}
            write = partial(files.write, self._root, Snapshot(state.step, whole | tensors, plain))
        else:
            shards = self._sharded.copied({**model, **states})
            write = partial(self._sharded.write, self._root, Snapshot(state.step, tensors, plain), shards)
        self._pending = self._writer.submit(self._write, state.step, write)

    def finish(self, last: bool = False) -> None:
        """Wait for the save in progress. A failure is logged as an error, and raised only if this is the run's `last`
        save or checkpoint.on_failure is "stop".
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            with stage("saving the run"):
                pending.result()
        except RankError:
            raise
        except OSError as error:
            if last or self._settings.on_failure == "stop":
                raise
            logger.error(
                "the run could not be saved: %s. Training continues, and the previous checkpoint is intact; the next "
                "save is made at its usual time", error,
            )  # fmt: skip

    def resumed_at(self, step: int) -> None:
        """Record that the checkpoint of `step` exists and is intact."""
        self._saved_step = step

    def close(self) -> None:
        with finishing():
            self._writer.shutdown()
            if self._remote is not None and not self._closed:
                self._closed = True
                with stage(f"uploading the last checkpoint to {self._remote.url}"):
                    self._remote.close()

    def _write(self, step: int, write: Callable[[], Path]) -> None:
        folder = write()
        if not self._ranks.first:
            return
        files.replace_text(self._root / LATEST, folder.name)
        self._saved_step = step
        if self._remote is not None:
            self._remote.upload(folder)
        # Later ones are damaged, or the run would have resumed from them: they don't count as kept.
        whole = [path for path in _folders(self._root) if path.name <= folder.name]
        for old in whole[self._settings.keep :]:
            if self._remote is not None and self._remote.needs(old):
                continue
            # Renamed first, so that a half-deleted folder is never taken for a checkpoint.
            doomed = old.with_name(f".deleted-{old.name}")
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def newest_step(root: Path) -> int:
    """The step of the newest intact checkpoint; -1 if there is none."""
    for folder in _folders(root):
        with suppress(DamagedError):
            files.verify(folder)
            return int(folder.name.removeprefix(files.PREFIX))
    return -1


def newest(root: Path) -> Snapshot | None:
    """The newest intact checkpoint, or None if there are no checkpoints. Damaged ones are skipped and logged as errors.

    ValueError if one was written by a later version, or if every checkpoint is damaged.
    """
    found = _folders(root)
    for folder in found:
        try:
            return files.read(folder)
        except DamagedError as error:
            logger.error("skipping a damaged checkpoint: %s. Trying the one before it", error)
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {root} is intact: see above, or start a new run with another "
            "run.id"
        )
    return None


def restore(snapshot: Snapshot, student: HasTensors, optimizer: HasState) -> TrainState:
    """Restore the saved state. The mixture policy's own state is left to the caller, who knows which policy it is."""
    restore_student(snapshot, student)
    optimizer.load(snapshot.tensors["optimizer"])
    randomness.restore(snapshot.tensors["random"], snapshot.state["random"])
    return TrainState(snapshot.step, int(snapshot.state["tokens"]), MixtureState.from_json(snapshot.state["mixture"]))


def restore_student(snapshot: Snapshot, student: HasTensors) -> None:
    """Restore weights and buffers only. ValueError if they belong to a different student."""
    ours = student.tensors()
    saved = snapshot.tensors["model"]
    different = sorted(ours.keys() ^ saved.keys())
    with torch.no_grad():
        for name in () if different else ours:
            values = saved[name]  # read once: sharded tensors are assembled on each access
            if values.shape == ours[name].shape:
                ours[name].copy_(like(ours[name], values))
            else:
                different.append(name)
    if different:
        raise ValueError(
            f"the checkpoint is of another student: {different[0]} and {len(different) - 1} more tensors differ"
        )


def _folders(root: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    return sorted((path for path in root.glob(f"{files.PREFIX}*") if path.is_dir()), reverse=True)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
