"""A batch and its targets on disk, to be looked at after the run has stopped over them. Called by `guard`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.settings.redact import redact

BATCH_TENSORS = ("tokens_BT", "position_ids_BT", "document_ids_BT", "loss_mask_BT", "source_ids_BT")


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
    save_file(
        {name: np.ascontiguousarray(getattr(batch, name)) for name in BATCH_TENSORS}, folder / "batch.safetensors"
    )
    if targets is not None:
        tensors = {
            f"{place}.{name}": np.ascontiguousarray(array)
            for place, answer in enumerate(targets.documents)
            if answer is not None
            for name, array in answer.tensors().items()
        }
        save_file(tensors, folder / "targets.safetensors")
    return folder
