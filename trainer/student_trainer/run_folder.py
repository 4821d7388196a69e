"""The folder of one run, named by its id. Used by `build`.

runs/ID/settings.yaml  metrics.jsonl  evaluation.jsonl  passage.json  checkpoints/  dumps/
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from student_trainer.settings import RunSettings

SETTINGS_FILE = "settings.yaml"
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


@dataclass(frozen=True)
class RunFolder:
    id: str
    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def dumps(self) -> Path:
        return self.path / "dumps"


def folder_of(settings: RunSettings, run_id: str) -> RunFolder:
    return RunFolder(run_id, Path(settings.root) / run_id)


def choose_folder(settings: RunSettings, has_copies: bool = False) -> RunFolder:
    """The run's folder. ValueError if the id cannot be one, or if `resume` and what is there do not fit.

    `has_copies`: the run may be resumed from a copy elsewhere.
    """
    run_id = settings.id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    if not SAFE_ID.fullmatch(run_id):
        raise ValueError(f"run.id={run_id}: letters, digits, '.', '_' and '-' are expected, 101 at most")
    folder = folder_of(settings, run_id)
    started = (folder.path / SETTINGS_FILE).exists()
    if settings.resume == "never" and started:
        raise ValueError(f"{folder.path} holds a run, and run.resume is never: choose another run.id, or remove it")
    if settings.resume == "require" and not started and not has_copies:
        raise ValueError(f"{folder.path} holds no run to resume, and run.resume is require: is it the right run.id?")
    return folder
