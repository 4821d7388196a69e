"""The folder of one run, named by its id: locking it, cleaning up after killed processes, and finding the checkpoint to
resume from. Used by `build`.

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

import yaml

from student_trainer.checkpoint.checkpoints import newest, newest_step
from student_trainer.checkpoint.files import Snapshot, replace_text
from student_trainer.checkpoint.remote import RemoteCheckpoints
from student_trainer.checkpoint.resume import check_changes
from student_trainer.ranks import Ranks
from student_trainer.settings import RunSettings, Settings
from student_trainer.settings.redact import public
from student_trainer.students.compute import as_begun
from teacher_proto.process.stages import stage

logger = logging.getLogger(__name__)
SETTINGS_FILE = "settings.yaml"
LOCK_FILE = ".lock"
# Temporary names of saves, downloads and small files, and of checkpoints that are being deleted.
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
    """The run's folder. ValueError if the id is invalid, or if `resume` rules out what the folder holds.

    `has_copies`: the run may be resumed from a remote copy.
    """
    run_id = settings.id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    if not SAFE_ID.fullmatch(run_id):
        raise ValueError(f"run.id={run_id}: expected at most 101 letters, digits, '.', '_' and '-'")
    folder = folder_of(settings, run_id)
    started = (folder.path / SETTINGS_FILE).exists()
    if settings.resume == "never" and started:
        raise ValueError(f"{folder.path} holds a run, but run.resume is never: choose another run.id, or remove it")
    if settings.resume == "require" and not started and not has_copies:
        raise ValueError(f"{folder.path} holds no run to resume, but run.resume is require: check run.id")
    return folder


def take(folder: RunFolder, stack: ExitStack) -> bool:
    """Lock the folder until `stack` closes or the process ends, however it ends. False if another live process holds
    it. On a file system without locks this warns and returns True, since nothing can be checked.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no two processes train this run", folder.path, error)
    return True


def sweep(folder: RunFolder) -> list[str]:
    """Remove what killed processes left in a folder that we have locked (`take`), and return the names.

    None of it is needed to resume. What can't be removed is left, with a warning.
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
        logger.info("removed leftovers of killed processes from %s: %s", folder.path, ", ".join(swept))
    return swept


def open_folder(settings: Settings, ranks: Ranks, stack: ExitStack) -> RunFolder:
    """The run's folder: rank 0 chooses it, then it is locked and cleaned before any rank reads or downloads into it."""
    run_id = ""
    with ranks.sync_errors():
        if ranks.first:
            run_id = choose_folder(settings.run, has_copies=settings.checkpoint.url is not None).id
    folder = folder_of(settings.run, ranks.from_first(run_id))
    with ranks.sync_errors():
        # One rank per machine: the machines may have separate disks.
        if ranks.local == 0 and take(folder, stack):
            sweep(folder)
        elif ranks.first:
            logger.warning(
                "another running process has locked %s: if it trains the same run, stop one of the two", folder.path
            )
    return folder


def find_earlier(
    settings: Settings, folder: RunFolder, ranks: Ranks, remote: RemoteCheckpoints | None
) -> Snapshot | None:
    """The checkpoint to resume from, local or remote, if there is one and the settings allow it.

    ValueError if `run.resume` or changed settings forbid it, or if the ranks find different checkpoints.
    """
    with ranks.sync_errors():
        if remote is not None and ranks.local == 0:
            with stage(f"looking for a later checkpoint in {remote.url}"):
                _fetch_later(settings, folder, remote, str(ranks.rank))
    if settings.run.resume == "never":
        return None
    with ranks.sync_errors(), stage("reading the newest checkpoint"):
        snapshot = newest(folder.checkpoints)
    step = -1 if snapshot is None else snapshot.step
    if ranks.largest(step) != -ranks.largest(-step):
        raise ValueError(
            f"the ranks find different checkpoints in {folder.checkpoints}: put run.root on a file system that "
            "they share"
        )
    if snapshot is not None:
        check_changes(snapshot.state["settings"], as_begun(settings, snapshot.state["settings"]))
    elif settings.run.resume == "require":
        raise ValueError(f"{folder.checkpoints} holds no checkpoint, but run.resume is require")
    return snapshot


def _fetch_later(settings: Settings, folder: RunFolder, remote: RemoteCheckpoints, name: str) -> None:
    """Download the store's newest checkpoint into the run's folder if it is newer than the local one."""
    if settings.run.resume == "never":
        if remote.steps():
            raise ValueError(f"{remote.url} holds a run, but run.resume is never: choose another run.id, or remove it")
        return
    here = newest_step(folder.checkpoints)
    try:
        remote.pull(folder.checkpoints, here, name)
    except OSError as error:
        if here < 0:
            raise
        logger.error("can't look for a later checkpoint in %s: %s. Continuing from the local one", remote.url, error)


def write_settings(settings: Settings, folder: RunFolder) -> None:
    """Write settings.yaml, for people who look at the run and for later runs that start from its student."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.checkpoints.mkdir(exist_ok=True)
    replace_text(folder.path / SETTINGS_FILE, yaml.safe_dump(public(settings), sort_keys=False))
