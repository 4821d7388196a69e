"""Checks a store's file for damage, in a separate process, since LMDB may abort on a damaged page.

`check(path)` runs `python -m teacher_proto.store.verify PATH`, which walks every table. `users.py` calls it before
`lmdb_lru.py` opens a file: disk damage then means a start with an empty store, not a teacher that dies at every start.
Others may write meanwhile. Only what the walk itself finds counts as damage; a check that could not be made says
nothing about the file.
"""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_proto.process.stages import stage

if TYPE_CHECKING:
    import lmdb

TABLES = (b"records", b"usage", b"order", b"meta", b"teachers")
PAGE = 4096
# Address space reserved for a reader, so that the file may grow under it; it costs nothing until it is used.
READER_MAP = 2**38
_FAULT = 3
_TRIES = 5
# The signals by which a damaged page may end the process that reads it.
_BY_DAMAGE = {signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}


class UncheckedError(OSError):
    """The check failed or was killed: nothing is known about the file."""


def check(path: Path) -> str | None:
    """Why the file at `path` can't be used; None if it can, or does not exist yet. UncheckedError."""
    if not (path / "data.mdb").exists():
        return None
    with stage(f"checking the store {path}"):
        child = subprocess.run(
            [sys.executable, "-m", "teacher_proto.store.verify", str(path)], capture_output=True, text=True,
            check=False, start_new_session=True,  # Ctrl-C must not reach the child: the check would count as failed
        )  # fmt: skip
    if child.returncode == 0:
        return None
    said = (child.stderr or child.stdout).strip().splitlines()
    if child.returncode == _FAULT:
        return said[-1]
    if child.returncode < 0 and -child.returncode in _BY_DAMAGE:
        return f"reading it ended with {signal.Signals(-child.returncode).name}"
    raise UncheckedError(
        f"could not check the target store at {path} for damage: the check ended with code "
        f"{child.returncode} ({said[-1] if said else 'no output'}). Start again"
    )


def walk(path: Path) -> str | None:
    """The fault that a walk over all tables finds, or None. May end the process. Raises lmdb.Error, OSError."""
    import lmdb

    with lmdb.open(str(path), readonly=True, lock=False, max_dbs=len(TABLES), map_size=READER_MAP) as env:
        # Before any page is touched: reading beyond the end of the file gives SIGBUS. The file grows before its header
        # says so, so its size is read last.
        expected = (env.info()["last_pgno"] + 1) * PAGE
        if (size := (path / "data.mdb").stat().st_size) < expected:
            return f"it is truncated to {size} of {expected} bytes"
    with open_to_read(path) as env, env.begin(buffers=True) as txn:
        tables = {name: env.open_db(name, txn=txn, create=False) for name in TABLES if txn.get(name) is not None}
        if not tables:
            return None
        counts = {name: sum(1 for _ in txn.cursor(table).iternext(values=False)) for name, table in tables.items()}
        if not counts.get(b"records") == counts.get(b"usage") == counts.get(b"order"):
            return f"its tables are inconsistent: {counts}"
        for key, usage in txn.cursor(tables[b"usage"]):
            if txn.get(key, db=tables[b"records"]) is None or txn.get(usage[:8], db=tables[b"order"]) != key:
                return "its tables are inconsistent: a record is missing"
    return None


def open_to_read(path: Path) -> lmdb.Environment:
    """Open a store's environment for reading, without a lock file if none can be written."""
    import lmdb

    for size in (READER_MAP, 0):  # 0: the map size that the file records
        for lock in (True, False):
            try:
                return lmdb.open(
                    str(path), readonly=True, max_dbs=len(TABLES), max_readers=512, map_size=size, lock=lock
                )
            except lmdb.MemoryError:
                break  # that much address space is not available
            except (lmdb.ReadonlyError, lmdb.LockError, PermissionError):
                # On a read-only mount no lock file can be written.
                if not lock:
                    raise
    raise lmdb.MemoryError(f"not enough address space to map {path}")


def _fault(path: Path) -> str | None:
    """What `walk` finds. Without locks, a file that is written to while it is read may look damaged: only what is found
    while nothing was written is a fault.
    """
    import lmdb

    fault: str | None = None
    for _ in range(_TRIES):
        before = _state(path)
        try:
            fault = walk(path)
        except (lmdb.ReadersFullError, lmdb.LockError, lmdb.ReadonlyError, lmdb.TlsFullError):
            raise  # concerns the file's users, not the file
        except lmdb.MapResizedError:
            continue
        except lmdb.MemoryError as error:
            with (path / "data.mdb").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
                # The file itself can be mapped, so it is its header that claims more.
                fault = str(error)
        except lmdb.Error as error:
            fault = str(error)
        if fault is None or _state(path) == before:
            return fault
    raise lmdb.Error(f"it was written to during every check, and the last one found: {fault}")


def _state(path: Path) -> tuple[int, int]:
    """Size and modification time, which change with every write. LMDB's counter is in the first pages, unverified."""
    stat = (path / "data.mdb").stat()
    return stat.st_size, stat.st_mtime_ns


def main() -> None:
    import lmdb

    try:
        fault = _fault(Path(sys.argv[1]))
    except (lmdb.Error, OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if fault:
        print(fault, file=sys.stderr)
        sys.exit(_FAULT)


if __name__ == "__main__":
    main()
