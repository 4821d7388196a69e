"""The folder of one run, named by its id; who works in it, and the rubbish of those who were killed. Used by `build`.

runs/ID/settings.yaml  metrics.jsonl  evaluation.jsonl  passage.json  checkpoints/  dumps/
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from student_trainer.settings import RunSettings

logger = logging.getLogger(__name__)
SETTINGS_FILE = "settings.yaml"
LOCK_FILE = ".lock"
# What a save, a download or a small file is called until it is whole, and a checkpoint on its way out.
LEFTOVERS = (".unfinished-*", ".deleted-*", ".damaged-*", ".download-*", ".*.new")
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


def take(folder: RunFolder, stack: ExitStack) -> bool:
    """Mark the folder as this process's until `stack` closes or the process ends, however it does. False if another
    living process has it. One that comes on a file system without locks has it alone, as far as anyone can tell.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that no two processes train this run", folder.path, error)
    return True


def sweep(folder: RunFolder) -> list[str]:
    """Remove what killed processes have left in a folder that is ours (`take`); their names.

    Nothing that a run can go on from is among it. What can't be removed is left, with a warning.
    """
    swept = []
    for place in (folder.path, folder.checkpoints):
        for path in sorted(path for pattern in LEFTOVERS for path in place.glob(pattern)):
            try:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError as error:
                logger.warning("%s, which a killed process left, can't be removed: %s", path, error)
            else:
                swept.append(path.name)
    if swept:
        logger.info("removed what killed processes had left in %s: %s", folder.path, ", ".join(swept))
    return swept
