"""Checks between targets and update: alignment, outages, non-finite numbers. Called by `loop`.

A refused batch and its targets are first written to the run's `dumps`, where they can be inspected.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.ranks import ALONE, Ranks
from student_trainer.settings import TeacherSettings
from student_trainer.settings.redact import redact
from student_trainer.targets.patience import OutageWatch
from student_trainer.targets.prefetch import Ready
from student_trainer.targets.sanity import check_alignment
from teacher_proto.errors import InvalidTargetsError

if TYPE_CHECKING:
    from student_trainer.losses.metrics import LossMetrics, LossSums
    from student_trainer.students.student import Student

logger = logging.getLogger(__name__)
DUMPED = ("tokens_BT", "position_ids_BT", "document_ids_BT", "loss_mask_BT", "source_ids_BT")  # arrays of a batch


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; nothing was updated."""


class TargetGuard:
    """`reason` returns the reason for an ongoing outage; `vocab_size` is passed to `check_alignment`. Each of several
    `ranks` dumps its own rows.
    """

    def __init__(
        self, settings: TeacherSettings, dumps: Path, vocab_size: int, reason: Callable[[], str], ranks: Ranks = ALONE
    ):
        self._settings, self._vocab_size, self._ranks = settings, vocab_size, ranks
        self._dumps = dumps if ranks.alone else dumps / f"rank-{ranks.rank}"
        self._watch = OutageWatch(settings, reason)
        self._checked = settings.sanity == "off"

    def watch(self, waited_s: float, save: Callable[[], None] | None) -> None:
        """To be called while a step waits."""
        self._watch(waited_s, save)

    def check(self, ready: Ready) -> None:
        """Check the alignment of the first batch that this process trains on. InvalidTargetsError if it is wrong."""
        if self._checked or ready.targets is None:
            return
        # A rollout may be nonsense to the teacher, so the full check is left to the first batch of data.
        likely = ready.batch.kind == "data"
        self._checked = likely
        try:
            check_alignment(ready.batch, ready.targets, self._vocab_size, likely=likely)
        except InvalidTargetsError as error:
            if self._settings.sanity == "warn":
                logger.warning("%s", error)
                return
            raise self.refuse(ready.batch, ready.targets, error) from error

    def refuse(self, batch: Batch, targets: BatchTargets | None, error: InvalidTargetsError) -> InvalidTargetsError:
        """Dump what was refused, and return the same error with the dump's folder in its message."""
        refused = copy.copy(error)
        refused.message = f"{error}. {self._dumped(f'batch-{batch.number:08d}', str(error), batch, targets)}"
        refused.args = (refused.message,)
        return refused

    def require_finite(self, losses: LossMetrics, sums: LossSums, ready: Ready, student: Student, number: int) -> None:
        """NonFiniteError with step, source and documents if this step's loss or gradient is NaN or infinite."""
        if losses.finite:
            return
        where = bad_tokens(sums, ready) or _bad_parameters(student)
        if not self._ranks.alone:
            where = f"on rank {self._ranks.rank} of {self._ranks.world}, {where}"
        keys = ", ".join(document.key for document in ready.batch.documents[:8])
        message = (
            f"step {number + 1} is not finite (loss {losses.loss}, gradient norm {losses.grad_norm}), its update was "
            f"not made: {where}. Documents of the batch: {keys}{', ...' if len(ready.batch.documents) > 8 else ''}"
        )
        dumped = self._dumped(f"step-{number + 1:08d}", message, ready.batch, ready.targets)
        raise NonFiniteError(f"{message}. {dumped}")

    def _dumped(self, name: str, message: str, batch: Batch, targets: BatchTargets | None) -> str:
        """Write a dump, and return a sentence that says where it is. A full disk must not hide the error that it is
        about.
        """
        what = "Batch and targets" if targets is not None else "The batch"
        try:
            folder = write_dump(self._dumps / name, message, batch, targets)
        except (OSError, SafetensorError) as error:
            return f"{what} could not be written to {self._dumps / name}: {error}"
        return f"{what} {'are' if targets is not None else 'is'} in {folder}"


def bad_tokens(sums: LossSums, ready: Ready) -> str:
    """Describe the first token whose loss is not finite: term, source and document. Empty if all are finite."""
    for values, micro in zip(sums.per_term, ready.micro, strict=True):
        for name, value_N in values.items():
            # Checking every token is slow, but this step is lost anyway.
            bad_N = ~value_N.isfinite()
            if bad_N.any():
                index = int(bad_N.int().argmax())
                part = ready.batch.rows(micro.first_row, micro.first_row + micro.rows)
                row_C, column_C = part.counted()
                position = int(micro.view.counted_N[index])
                row, column = int(row_C[position]) + micro.first_row, int(column_C[position])
                key = part.documents[int(micro.documents_N[index])].key
                source = ready.batch.source_names[int(micro.sources_N[index])]
                return f"{name} is {float(value_N[index])} in source {source}, document {key}, row {row} token {column}"
    return ""


def _bad_parameters(student: Student) -> str:
    bad = [
        name
        for name, parameter in student.model.named_parameters()
        if parameter.grad is not None and not math.isfinite(float(_shard(parameter.grad).sum()))
    ]
    return f"every loss is finite, but the gradient of {', '.join(bad[:5]) or 'some parameter'} is not"


def _shard(gradient: Tensor) -> Tensor:
    """This rank's part; gathering the full gradient would need the other ranks, which may not be here."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def write_dump(folder: Path, message: str, batch: Batch, targets: BatchTargets | None) -> Path:
    """Write `about.json`, `batch.safetensors` and `targets.safetensors`, whose tensors are named `DOCUMENT.name`."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "message": redact(message),
        "batch": batch.number,
        "fingerprint": targets.fingerprint if targets else None,
        "documents": [{**vars(document)} for document in batch.documents],
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2))
    save_file({name: np.ascontiguousarray(getattr(batch, name)) for name in DUMPED}, folder / "batch.safetensors")
    if targets is not None:
        tensors = {
            f"{place}.{name}": np.ascontiguousarray(array)
            for place, answer in enumerate(targets.documents)
            if answer is not None
            for name, array in answer.tensors().items()
        }
        save_file(tensors, folder / "targets.safetensors")
    return folder
