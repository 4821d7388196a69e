"""A process that ends when the one that started it is gone, however that one ended. Called by every command's `main`.

A process that is killed can't end its children, and no signal tells them. Here a thread of the child waits for the
parent: on Linux for the end of its pid, elsewhere by asking once a second. (The kernel's own signal at a parent's death
comes when the *thread* that started the child ends, which may be long before its process does.)
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable

VARIABLE = "STILLHOUSE_DIE_WITH_PARENT"
# A service or a trainer that is told to stop has this long to save or answer what it can.
GRACE_S = 3.0
_ASK_EVERY_S = 1.0


def end_with_parent_if_asked() -> None:
    """For a `main`: end with the parent where the environment says `STILLHOUSE_DIE_WITH_PARENT=1`."""
    if os.environ.get(VARIABLE, "") not in ("", "0"):
        end_with_parent()


def end_spawned_with_parent() -> None:
    """For a module that is imported first in the processes that multiprocessing spawns: each ends with its parent, at
    once. Nothing happens in a process that multiprocessing did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        # A fork server stands between the two, so it is not getppid that tells.
        _watch(parent.pid, parent.is_alive, grace_s=0.0)


def end_with_parent(grace_s: float = GRACE_S) -> None:
    """Watch the process that started this one, from a thread. Once it is gone, SIGTERM comes here, and SIGKILL
    `grace_s` seconds later.
    """
    parent = os.getppid()
    if parent != 0:  # 0: it lives in another container, and there is nothing to watch
        _watch(parent, lambda: os.getppid() == parent, grace_s)


def _watch(parent: int, is_there: Callable[[], bool], grace_s: float) -> None:
    thread = threading.Thread(target=_end_after, args=(parent, is_there, grace_s), name="watch-parent", daemon=True)
    thread.start()


def _end_after(parent: int, is_there: Callable[[], bool], grace_s: float) -> None:
    _wait_for_the_end(parent, is_there)
    if grace_s:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
    for child in multiprocessing.active_children():
        child.kill()  # those that do not watch by themselves, as a library's
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_the_end(parent: int, is_there: Callable[[], bool]) -> None:
    """Return when the process of the pid `parent` is not there any more."""
    if hasattr(os, "pidfd_open"):
        try:
            descriptor = os.pidfd_open(parent)
        except ProcessLookupError:
            return
        except OSError:
            descriptor = -1  # a kernel or a sandbox without it
        if descriptor >= 0:
            # Only now, with the pid held, does the answer stay true.
            if is_there():
                select.select([descriptor], [], [])
            os.close(descriptor)
            return
    while is_there():
        time.sleep(_ASK_EVERY_S)
