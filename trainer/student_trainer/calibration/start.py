"""Calibrates a student before a run's first step, if some of its initial values come from data. These are SubLN's
gains, and the closed form of low-rank corrections. Called by `build`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from student_trainer.batch.align import cut
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import ViewSeed
from student_trainer.calibration.calibrate import FOLDER, calibrate
from student_trainer.calibration.sub_norms import calibrate_sub_norms, untrained_sub_norms
from student_trainer.data.loader import BatchSource
from student_trainer.ranks import Ranks
from student_trainer.settings import Settings
from student_trainer.students.adapters.lrc import uncalibrated
from student_trainer.students.student import Student
from teacher_proto.identity import digest
from teacher_proto.process.stages import stage

# Settings of the data that do not change the batches.
HOW_IT_IS_READ = {"workers", "batches_ahead", "cache_folder", "held_out_rows"}


def calibrate_at_start(
    settings: Settings, student: Student, source: BatchSource, identity: dict[str, Any], folder: Path, ranks: Ranks
) -> None:
    """Calibrate a student whose norms or corrections are still as they were added, on the run's first batches; does
    nothing for any other. Call it before the student is sharded, on all ranks.
    """
    if settings.student.quantisation.sub_norm_start == "rms" and untrained_sub_norms(student.model):
        # A mean over one number per token: one batch is enough.
        calibrate_sub_norms(student, list(_micro_batches(settings, student, source, batches=1)), ranks)
    wanted = settings.student.lrc
    if settings.student.adapter_name != "lrc" or wanted.start != "closed_form" or not uncalibrated(student.model):
        return
    with stage("reading the calibration text"):
        batches = math.ceil(wanted.sequences / settings.data.rows)
        micros = list(_micro_batches(settings, student, source, batches))
    errors = calibrate(student, micros, wanted, folder / FOLDER, _digest(settings, identity, ranks), ranks)
    if ranks.first:
        found = {name: {"before": before, "after": after} for name, (before, after) in errors.items()}
        (folder / FOLDER / "errors.json").write_text(json.dumps(found, indent=1))


def _micro_batches(
    settings: Settings, student: Student, source: BatchSource, batches: int
) -> Iterator[MicroBatch]:  # fmt: skip
    state, seed = source.initial_state(), ViewSeed(settings.run.seed)
    for number in range(batches):
        batch, state = source.batch(state, number)
        # Text is measured whether or not it is learnt: a rank's rows may be of prompts alone.
        for micro in cut(batch, None, student, seed, rows=settings.optim.micro_batch_rows, keep_empty=True):
            yield micro.to(student.device)


def _digest(settings: Settings, identity: dict[str, Any], ranks: Ranks) -> str:
    """The digest of everything that decides the outcome."""
    data = settings.data.model_dump(mode="json", exclude=HOW_IT_IS_READ)
    student = settings.student.model_dump(mode="json")
    rows = (settings.run.seed, settings.optim.micro_batch_rows, ranks.world)
    return digest([student, data, list(rows), identity])
