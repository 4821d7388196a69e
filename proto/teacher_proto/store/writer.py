"""Writes targets to a store from a background thread, so that an event loop never waits for a disk. Used by the teacher
service and by `stillhouse-teacher fill`.

writer = StoreWriter(store)
writer.add(fingerprint, query, targets)    # returns at once; dropped and counted if too much is pending
writer.close()                             # returns when everything pending is written
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.requests import Query
from teacher_proto.store.entry import Entry, split
from teacher_proto.store.target_store import TargetStore
from teacher_proto.targets import TokenTargets

log = logging.getLogger(__name__)


class StoreWriter:
    """Batches what is added within `delay_s` into one transaction. At most `max_pending_bytes` are pending."""

    def __init__(
        self, store: TargetStore | TargetDataset, *, max_pending_bytes: int = 256 * 2**20, delay_s: float = 0.2
    ):
        self.dropped = 0
        self._store = store
        self._max_pending_bytes = max_pending_bytes
        self._delay_s = delay_s
        self._pending: deque[tuple[Entry, TokenTargets]] = deque()
        self._pending_bytes = 0
        self._busy = False
        self._ended = False
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def add(self, fingerprint: str, query: Query, targets: TokenTargets) -> bool:
        """Have targets written. Returns False, and drops them, if too much is pending already."""
        size = targets.nbytes
        with self._changed:
            if self._pending_bytes + size > self._max_pending_bytes or self._closing.is_set():
                self.dropped += 1
                return False
            self._pending.extend(split(fingerprint, query, targets))
            self._pending_bytes += size
            self._changed.notify_all()
        return True

    def flush(self) -> None:
        """Wait until everything added is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not (self._pending or self._busy))

    def close(self) -> None:
        """Write what is pending, and end the thread. The store stays open."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._write_until_closed()
        finally:
            # Also if a bug ended the thread: `flush` must not wait for it forever.
            with self._changed:
                self._closing.set()
                self._ended = True
                self._changed.notify_all()

    def _write_until_closed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing.is_set())
                if not self._pending:
                    return
            self._closing.wait(self._delay_s)
            with self._changed:
                batch = list(self._pending)
                self._pending.clear()
                self._pending_bytes = 0
                self._busy = True
            try:
                self._store.put_entries(batch)
            except OSError as error:
                # A store logs such failures itself; a dataset raises them. Either is only a cache: later batches are
                # tried again.
                log.error("%s: what was to be written with %d targets is lost: %s", self._store.path, len(batch), error)
                with self._changed:
                    self.dropped += len(batch)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
