"""A folder at any fsspec URL, with atomic writes and retries during outages. Used by the rest of the package.

On a local disk an object is written under a temporary name and renamed; a bucket's objects appear when their upload is
complete. A killed writer leaves its temporary file, which `remove_unfinished` finds.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

# Errors that a retry does not change.
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError, ValueError, TypeError)
_LOCAL = ("file", "local")
_LONGEST_PAUSE_S = 15.0
# The temporary names that `_write` uses; no other files are touched.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")
# A temporary file that has not been written to for this long belongs to a dead or suspended writer. If that resumes
# after all, it finds its file gone and writes it again.
QUIET_S = 3600.0


def is_url(place: str) -> bool:
    return "://" in place


class Folder:
    """`options` go to the file system. A failed request is retried for `outage_s` seconds before its error is raised.
    ValueError if no file system for the URL is installed.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, *, outage_s: float = 120.0,
        sleep: Callable[[float], object] = time.sleep,
    ):  # fmt: skip
        try:
            import fsspec
        except ImportError:
            raise ValueError("a target dataset needs fsspec and pyarrow: pip install 'stillhouse[dataset]'") from None
        self.url, self._outage_s, self._sleep = url.rstrip("/"), outage_s, sleep
        try:
            self.fs, self._root = fsspec.core.url_to_fs(self.url, **(options or {}))
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot open {url!r}: {error}. s3:// and gs:// need stillhouse[cloud]") from None
        protocol = self.fs.protocol
        self.local = (protocol if isinstance(protocol, str) else protocol[0]) in _LOCAL

    def list(self, below: str) -> dict[str, int]:
        """Names and sizes of the objects directly in `below`, without unfinished ones."""

        def listed() -> dict[str, int]:
            self.fs.invalidate_cache()
            try:
                infos = self.fs.ls(self._path(below), detail=True)
            except FileNotFoundError:
                return {}
            names = {info["name"].rsplit("/", 1)[-1]: info for info in infos if info["type"] == "file"}
            return {name: int(info["size"]) for name, info in names.items() if name and not name.startswith(".")}

        return self._try(f"listing {self.url}/{below}", listed)

    def read(self, name: str) -> bytes:
        return bytes(self._try(f"reading {self.url}/{name}", lambda: self.fs.cat_file(self._path(name))))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop); fewer if the object ends before."""
        return bytes(self._try(f"reading {self.url}/{name}", lambda: self._range(name, start, stop)))

    def write(self, name: str, data: bytes) -> None:
        """Write an object atomically, replacing any of that name."""
        self._try(f"writing {self.url}/{name}", lambda: self._write(self._path(name), data))

    def local_path(self, name: str) -> str:
        assert self.local, "a bucket's objects have no path"
        return self._path(name)

    def remove(self, name: str) -> None:
        self._try(f"removing {self.url}/{name}", lambda: self.fs.rm_file(self._path(name)))

    def unfinished(self, below: str) -> dict[str, float]:
        """Temporary files directly in `below`, of running or killed writers, with the time each was last written to."""
        if not self.local:
            return {}
        try:
            infos = self.fs.ls(self._path(below), detail=True)
        except FileNotFoundError:
            return {}
        names = {info["name"].rsplit("/", 1)[-1]: float(info["mtime"]) for info in infos if info["type"] == "file"}
        return {name: written for name, written in names.items() if _UNFINISHED.fullmatch(name)}

    def remove_unfinished(self, below: str, quiet_s: float = QUIET_S) -> tuple[str, ...]:
        """Remove those of `unfinished` that have not been written to for `quiet_s` seconds; returns their names."""
        found = self.unfinished(below)
        if not found:
            return ()
        now = self._clock(below)
        stale = tuple(name for name, written in found.items() if now - written >= quiet_s)
        for name in stale:
            with contextlib.suppress(FileNotFoundError):  # another process cleans up too
                self.fs.rm_file(self._path(f"{below}/{name}" if below else name))
        return stale

    def _clock(self, below: str) -> float:
        """The file system's time, which may be another machine's: the mtime of a file written now."""
        path = self._path(f"{below}/.clock.{uuid.uuid4().hex}" if below else f".clock.{uuid.uuid4().hex}")
        self.fs.pipe_file(path, b"")
        try:
            return float(self.fs.info(path)["mtime"])
        finally:
            self.fs.rm_file(path)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        try:
            return self.fs.cat_file(self._path(name), start=start, end=stop)
        except FileNotFoundError:
            raise
        except Exception:
            # Object stores answer 416 to a range beyond the end, each with a different exception.
            if start >= int(self.fs.info(self._path(name))["size"]):
                return b""
            raise

    def _write(self, path: str, data: bytes) -> None:
        if not self.local:
            self.fs.pipe_file(path, data)
            return
        parent, _, name = path.rpartition("/")
        part = f"{parent}/.{name}.{uuid.uuid4().hex}"
        self.fs.makedirs(parent, exist_ok=True)
        try:
            self.fs.pipe_file(part, data)
            try:
                self.fs.mv(part, path)
            except FileNotFoundError as error:
                # It was removed as a killed writer's. An OSError, since unlike other missing files a retry fixes this.
                raise OSError(f"{part} was removed while it was being written") from error
        except BaseException:
            with contextlib.suppress(OSError):
                self.fs.rm_file(part)
            raise

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _try(self, what: str, work: Callable[[], T]) -> T:
        """Retry `work` until it succeeds. Raises its error if a retry can't help or `outage_s` seconds have passed."""
        began, pause_s = time.monotonic(), 0.2
        while True:
            try:
                return work()
            except _FINAL:
                raise
            except Exception as error:  # each object store has different exceptions
                lasted_s = time.monotonic() - began
                if lasted_s >= self._outage_s:
                    raise OSError(f"{what} has failed for {lasted_s:.0f} s: {type(error).__name__}: {error}") from error
                log.warning("%s: %s: %s; retrying in %.1f s", what, type(error).__name__, error, pause_s)
                self._sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
