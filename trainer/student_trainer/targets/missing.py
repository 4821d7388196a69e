"""Finds the documents of a run that its target dataset lacks, before training starts. Called by `build`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from student_trainer.data.ahead import distinct, documents_ahead
from student_trainer.data.loader import BatchSource
from student_trainer.settings import Settings
from student_trainer.state import TrainState
from student_trainer.targets.cached import CachedTargets, MissingTargetsError, fill_options
from student_trainer.targets.protocol import Targets
from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.requests import TargetSpec

logger = logging.getLogger(__name__)
AT_ONCE = 4096


def list_missing(
    settings: Settings, targets: Targets | None, specs: Sequence[TargetSpec], tokenizer: Any, state: TrainState,
    folder: Path,
) -> None:  # fmt: skip
    """Look up all remaining documents of a run in its target dataset, and write the missing ones to a file in `folder`.
    Does nothing for a run without a dataset, or whose losses decide which documents it draws.

    If documents are missing, or the dataset was filled with less than `specs`: MissingTargetsError, or only a warning
    if there is a teacher behind the dataset.
    """
    if not isinstance(targets, CachedTargets) or targets.dataset is None or not settings.teacher.list_missing:
        return
    if state.policy.policy.varies:
        logger.info("teacher.list_missing has no effect: the losses decide which documents this run draws")
        return
    if lacking := [spec for spec in specs if not targets.dataset.covers(spec)]:
        _refuse_query(targets.dataset, lacking[0], targets.writes_through)
        return
    # A separate source, so that the run's own counters stay at zero.
    source = BatchSource(settings.data, tokenizer, settings.run.seed)
    try:
        ahead = documents_ahead(source, state.mixture, settings.run.steps - state.step, settings.evaluation.every > 0)
        _report(look_up(targets.dataset, ahead, folder / "missing.jsonl"), targets.dataset, targets.writes_through)
    finally:
        source.close()


@dataclass
class Coverage:
    """How many of a run's distinct documents a dataset has. `file` holds the missing ones; `first` names a few."""

    file: Path
    documents: int = 0
    tokens: int = 0
    missing: int = 0
    missing_tokens: int = 0
    first: list[str] = field(default_factory=list)


def look_up(dataset: TargetDataset, documents: Iterable[tuple[str, list[int]]], file: Path) -> Coverage:
    """Look up documents, given as names and token ids, by their tokens, and write the missing ones to `file`."""
    found = Coverage(file)
    fresh = distinct(documents)
    with file.open("w") as out:
        while group := list(islice(fresh, AT_ONCE)):
            there = dataset.holds([np.array(ids, dtype=np.int64) for _, ids in group])
            for (key, ids), has in zip(group, there, strict=True):
                found.documents, found.tokens = found.documents + 1, found.tokens + len(ids)
                if not has:
                    found.missing, found.missing_tokens = found.missing + 1, found.missing_tokens + len(ids)
                    found.first += [key] if len(found.first) < 3 else []
                    out.write(json.dumps({"input_ids": ids}) + "\n")
    if not found.missing:
        file.unlink()
    return found


def _report(found: Coverage, dataset: TargetDataset, writes_through: bool) -> None:
    if not found.missing:
        logger.info(
            "the target dataset at %s has all %d documents of the run, %d tokens", dataset.path, found.documents,
            found.tokens,
        )  # fmt: skip
        return
    said = (
        f"the target dataset at {dataset.path} lacks {found.missing:,} of the {found.documents:,} documents of this "
        f"run, {found.missing_tokens:,} of its {found.tokens:,} tokens (first {', '.join(found.first)}); they are in "
        f"{found.file}"
    )
    if writes_through:
        logger.warning("%s. They will be requested from the teacher behind the dataset as needed", said)
        return
    raise MissingTargetsError(
        f"{said}. Score them with `stillhouse-teacher fill MODEL {found.file} --output {dataset.path}"
        f"{fill_options(dataset.manifest.spec)}`, or request them from a teacher with teacher.on_miss=remote"
    )


def _refuse_query(dataset: TargetDataset, spec: TargetSpec, writes_through: bool) -> None:
    had = fill_options(dataset.manifest.spec)
    said = f"the target dataset at {dataset.path} was filled with{had}, but this run needs{fill_options(spec)}"
    if writes_through:
        logger.warning("%s: all targets will be requested from the teacher behind the dataset", said)
        return
    raise MissingTargetsError(
        f"{said}: fill another dataset with these options, or train with what this one has (teacher.top_k, losses' "
        "temperatures)"
    )
