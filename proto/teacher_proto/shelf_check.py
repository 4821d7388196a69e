"""Is a shelf's file whole? Asked in a process of its own, since LMDB may abort on a page that is not.

`check(path)` runs `python -m teacher_proto.shelf_check PATH`, which walks every table. `shelf.py` asks before it opens
a file: whatever a disk did to its pages then costs a start with an empty store, not a teacher that dies at each start.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lmdb

TABLES = (b"records", b"usage", b"order", b"meta", b"teachers")
PAGE = 4096


def check(path: Path) -> str | None:
    """Why the shelf at `path` can't be used, or None if it can, or is not there yet."""
    if not (path / "data.mdb").exists():
        return None
    child = subprocess.run(
        [sys.executable, "-m", "teacher_proto.shelf_check", str(path)], capture_output=True, text=True, check=False
    )
    if child.returncode == 0:
        return None
    lines = (child.stderr or child.stdout).strip().splitlines()
    return lines[-1] if lines else f"reading it ended with signal {-child.returncode}"


def walk(path: Path) -> str | None:
    """The fault that a walk over all tables meets, or None. May end the process."""
    import lmdb

    size = (path / "data.mdb").stat().st_size
    with lmdb.open(str(path), readonly=True, lock=False, max_dbs=len(TABLES)) as env:
        # Before a page is touched: beyond the end of the file there is only SIGBUS.
        expected = (env.info()["last_pgno"] + 1) * PAGE
        if size < expected:
            return f"{size} bytes are left of {expected}"
    with open_to_read(path) as env, env.begin(buffers=True) as txn:
        tables = {name: env.open_db(name, txn=txn, create=False) for name in TABLES if txn.get(name) is not None}
        if not tables:
            return None
        counts = {name: sum(1 for _ in txn.cursor(table).iternext(values=False)) for name, table in tables.items()}
        if not counts.get(b"records") == counts.get(b"usage") == counts.get(b"order"):
            return f"its tables do not fit together: {counts}"
        for key, usage in txn.cursor(tables[b"usage"]):
            if txn.get(key, db=tables[b"records"]) is None or txn.get(usage[:8], db=tables[b"order"]) != key:
                return "its tables do not fit together: a record is missing"
    return None


def open_to_read(path: Path) -> lmdb.Environment:
    """A shelf's environment for reading, without a lock file where the place allows none."""
    import lmdb

    try:
        return lmdb.open(str(path), readonly=True, max_dbs=len(TABLES), max_readers=512)
    except (lmdb.ReadonlyError, lmdb.LockError, PermissionError):
        # A read-only mount has nowhere to put a lock, and nobody who could write.
        return lmdb.open(str(path), readonly=True, lock=False, max_dbs=len(TABLES))


if __name__ == "__main__":
    import lmdb

    try:
        fault = walk(Path(sys.argv[1]))
    except (lmdb.Error, OSError) as error:
        fault = str(error)
    if fault:
        sys.exit(fault)
