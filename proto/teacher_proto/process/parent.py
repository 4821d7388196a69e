"""Ends a process when the one that started it is gone, however that one ended. Called by every command's `main`.

A killed process can't end its children, and they get no signal. So a thread of the child waits for the parent: on Linux
through a pidfd, elsewhere by polling once a second. (Linux's parent-death signal is sent when the *thread* that started
the child ends, which may be long before its process does.)
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
# How long a service or trainer that is told to stop has for saving its state or finishing requests.
GRACE_S = 3.0
_ASK_EVERY_S = 1.0


def end_with_parent_if_asked() -> None:
    """For a `main`: end with the parent if the environment has `STILLHOUSE_DIE_WITH_PARENT=1`."""
    if os.environ.get(VARIABLE, "") not in ("", "0"):
        end_with_parent()


def end_spawned_with_parent() -> None:
    """For a module that is imported first in processes spawned by multiprocessing: each ends with its parent, at once.
    Does nothing in a process that multiprocessing did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        # Not getppid: there may be a fork server between the two.
        _watch(parent.pid, parent.is_alive, grace_s=0.0)


def end_with_parent(grace_s: float = GRACE_S) -> None:
    """Watch the parent process from a thread. Once it is gone, this process gets SIGTERM, and SIGKILL `grace_s` seconds
    later.
    """
    parent = os.getppid()
    if parent != 0:  # 0: the parent is in another container and can't be watched
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
        child.kill()  # those that do not watch their parent, such as a library's
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_the_end(parent: int, is_there: Callable[[], bool]) -> None:
    """Return when the process with the pid `parent` is gone."""
    if hasattr(os, "pidfd_open"):
        try:
            descriptor = os.pidfd_open(parent)
        except ProcessLookupError:
            return
        except OSError:
            descriptor = -1  # a kernel or sandbox without pidfds
        if descriptor >= 0:
            # Checked after opening: a parent that still lives now is the process that the pidfd refers to.
            if is_there():
                select.select([descriptor], [], [])
            os.close(descriptor)
            return
    while is_there():
        time.sleep(_ASK_EVERY_S)
