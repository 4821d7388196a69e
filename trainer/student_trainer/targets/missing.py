"""Which documents of a run its target dataset lacks, told before the run begins. Called by `build`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from student_trainer.targets.cached import CachedTargets, MissingTargetsError, fill_options
from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.requests import TargetSpec

logger = logging.getLogger(__name__)
AT_ONCE = 4096


def list_missing(
    targets: CachedTargets, documents: Iterator[tuple[str, list[int]]], specs: Sequence[TargetSpec], file: Path
) -> None:
    """Look up all documents in the dataset's index, and write those that it lacks to `file`, once each.

    MissingTargetsError where there are some, or where the dataset was asked less than `specs`, and nobody else may be
    asked; a warning where somebody may.
    """
    dataset = targets.dataset
    assert dataset is not None, "a target store has no index of documents"
    lacking = [spec for spec in specs if not dataset.covers(spec)]
    if lacking:
        _refuse_query(dataset, lacking[0], targets.writes_through)
        return
    seen: set[bytes] = set()
    waiting: list[tuple[str, list[int]]] = []
    tokens = missing = missing_tokens = 0
    first: list[str] = []
    with file.open("w") as out:

        def look_up() -> None:
            nonlocal missing, missing_tokens
            there = dataset.holds([np.array(ids, dtype=np.int64) for _, ids in waiting])
            for (key, ids), has in zip(waiting, there, strict=True):
                if not has:
                    missing, missing_tokens = missing + 1, missing_tokens + len(ids)
                    first.append(key) if len(first) < 3 else None
                    out.write(json.dumps({"input_ids": ids}) + "\n")
            waiting.clear()

        for key, ids in documents:
            digest = hashlib.blake2b(np.array(ids, dtype="<i8").tobytes(), digest_size=8).digest()
            if digest in seen:
                continue
            seen.add(digest)
            tokens += len(ids)
            waiting.append((key, ids))
            if len(waiting) >= AT_ONCE:
                look_up()
        look_up()
    if not missing:
        file.unlink()
        logger.info(
            "the target dataset at %s has all %d documents of the run, %d tokens", dataset.path, len(seen), tokens
        )
        return
    said = (
        f"the target dataset at {dataset.path} lacks {missing:,} of the {len(seen):,} documents of this run, "
        f"{missing_tokens:,} of its {tokens:,} tokens (first {', '.join(first)}); they are in {file}"
    )
    if targets.writes_through:
        logger.warning("%s, and are asked of the teacher behind it as they come", said)
        return
    raise MissingTargetsError(
        f"{said}. Have them scored with `stillhouse-teacher fill MODEL {file} --output {dataset.path}"
        f"{fill_options(dataset.manifest.spec)}`, or have a teacher asked for them with teacher.on_miss=remote"
    )


def _refuse_query(dataset: TargetDataset, spec: TargetSpec, writes_through: bool) -> None:
    had = fill_options(dataset.manifest.spec)
    said = f"the target dataset at {dataset.path} was filled with{had}, and this run asks for{fill_options(spec)}"
    if writes_through:
        logger.warning("%s: all of it is asked of the teacher behind the dataset", said)
        return
    raise MissingTargetsError(
        f"{said}: fill another dataset with these, or train with what is there (teacher.top_k, losses' temperatures)"
    )
