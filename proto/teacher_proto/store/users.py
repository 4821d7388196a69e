"""Tracks which processes have a target store open; renames a damaged file if no other process has it open.

Called by `lmdb_lru.py` before it opens a file. Each user holds a file lock, which the kernel releases when it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path

from teacher_proto.store.verify import check

log = logging.getLogger(__name__)
FILE = "users.lock"
TRIES = 5  # waits of half a second for another process that may be renaming the same damaged file


class Users:
    """This process's lock on the store. Where the lock file can't be created, on a read-only mount, there is none."""

    def __init__(self, path: Path, readonly: bool):
        self._descriptor: int | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path / FILE, os.O_RDONLY | os.O_CREAT, 0o666)
        except OSError as error:
            if not readonly:
                raise ValueError(f"{path} can't be opened as a target store: {error}") from None

    def join(self) -> None:
        """Take the shared lock; waits while another process is renaming a damaged file."""
        self._lock(fcntl.LOCK_SH)

    def only_us(self) -> bool:
        """Try to take the exclusive lock. If True, no other process can have the store open until `join` or `close`."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, how: int) -> bool:
        if self._descriptor is None:
            return True
        try:
            fcntl.flock(self._descriptor, how)
        except BlockingIOError:
            return False
        except OSError as error:  # a file system without locks
            log.warning("can't tell which other processes have the target store open: %s", error)
        return True


def make_sure(path: Path, readonly: bool, users: Users) -> None:
    """Check the file and join its users. A damaged file is renamed, if no other process has it open.

    ValueError if it is damaged and can't be renamed.
    """
    for _ in range(TRIES):
        if (fault := check(path)) is None:
            users.join()
            return
        if readonly:
            raise ValueError(f"the target store at {path} is damaged: {fault}")
        if users.only_us():
            # Another process may have renamed it meanwhile.
            if (again := check(path)) is not None:
                _set_aside(path, again)
            users.join()
            return
        time.sleep(0.5)
    raise ValueError(
        f"the target store at {path} is damaged ({fault}), and another process has it open: stop that one and start "
        "again, then the damaged file is set aside"
    )


def _set_aside(path: Path, reason: str) -> None:
    data = path / "data.mdb"
    aside = next(p for i in range(1000) if not (p := path / f"data.mdb.damaged-{i}").exists())
    data.rename(aside)
    (path / "lock.mdb").unlink(missing_ok=True)
    log.error("the target store at %s is damaged (%s): moved to %s, starting an empty one", path, reason, aside)
