"""A run's checkpoints on any fsspec URL, beside those on its own disk. Built by `build`, fed by `checkpoints`.

    URL/RUN_ID/step-00000500/manifest.json, model.safetensors, ...

What was written and sealed here is uploaded in the background, its manifest last, and downloaded into the run's folder
when a run starts that has not got it, where every byte is held against the manifest. A store that is down costs the
copy, never a step.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from student_trainer.checkpoint import files
from student_trainer.checkpoint.files import MANIFEST, DamagedError
from student_trainer.settings import CheckpointSettings

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RemoteCheckpoints:
    """Those of the run `run_id` under `settings.url`. Uploads run on a thread of their own, the newest first."""

    def __init__(self, settings: CheckpointSettings, run_id: str):
        assert settings.url is not None
        self.url = f"{settings.url.rstrip('/')}/{run_id}"
        self._settings = settings
        self._fs: Any = None
        self._root = ""
        self._wake = threading.Condition()
        self._waiting: Path | None = None
        self._uploading: Path | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def upload(self, folder: Path) -> None:
        """Upload a sealed checkpoint, in the background; it takes the place of one that is still waiting."""
        with self._wake:
            self._waiting = folder
            self._wake.notify_all()

    def needs(self, folder: Path) -> bool:
        """Whether the folder must stay, as it is being uploaded."""
        return folder in (self._waiting, self._uploading)

    def steps(self) -> list[int]:
        """Of the checkpoints that are there whole, newest first. OSError if the store cannot be asked."""
        return self._asking(self._steps)

    def pull(self, root: Path, beyond: int, name: str) -> None:
        """Download the newest sound checkpoint of a later step than `beyond` into `root`, if there is one.

        `name` tells apart those who may do so at the same time. OSError if the store cannot be asked; a damaged
        checkpoint is passed over loudly.
        """
        for step in self.steps():
            if step <= beyond:
                return
            unfinished = root / f".download-{name}-{files.folder_name(step)}"
            try:
                self._asking(self._download, step, unfinished)
                files.verify(unfinished)
            except DamagedError as error:
                logger.error("REMOTE CHECKPOINT PASSED OVER: %s in %s. The one before it is tried", error, self.url)
                shutil.rmtree(unfinished, ignore_errors=True)
                continue
            files.make_way(root / files.folder_name(step))
            unfinished.rename(root / files.folder_name(step))
            files.sync_folder(root)
            logger.info("downloaded the checkpoint of step %d from %s", step, self.url)
            return

    def close(self) -> None:
        """Wait for what is under way, but no longer than the settings say."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join(self._settings.upload_within_s)
        if self._thread.is_alive():
            logger.error(
                "THE LAST CHECKPOINT IS NOT IN %s: its upload took more than checkpoint.upload_within_s=%g. It lies in "
                "the run's folder", self.url, self._settings.upload_within_s,
            )  # fmt: skip

    def _work(self) -> None:
        while (folder := self._next()) is not None:
            started = time.monotonic()
            try:
                self._upload(folder)
                self._keep_newest()
            except Exception as error:  # the edge of a thread that runs other people's code
                logger.error(
                    "THE CHECKPOINT %s IS NOT IN %s: %s: %s. Training goes on; the next one is uploaded when it is "
                    "saved", folder.name, self.url, type(error).__name__, error,
                )  # fmt: skip
            else:
                logger.info("uploaded %s to %s in %.1f s", folder.name, self.url, time.monotonic() - started)

    def _next(self) -> Path | None:
        with self._wake:
            self._uploading = None
            while self._waiting is None and not self._closed:
                self._wake.wait()
            self._uploading, self._waiting = self._waiting, None
            return self._uploading

    def _asking(self, call: Callable[..., T], *arguments: Any) -> T:
        """OSError for whatever the store's library raises: each has errors of its own."""
        try:
            return call(*arguments)
        except (DamagedError, OSError):
            raise
        except Exception as error:
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error

    def _store(self) -> Any:
        if self._fs is None:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **self._settings.storage_options)
        self._fs.invalidate_cache()
        return self._fs

    def _steps(self) -> list[int]:
        store = self._store()
        try:
            names = store.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        folders = [name.rstrip("/") for name in names]
        steps = [
            int(step)
            for name in folders
            if (step := name.rpartition("/")[2].removeprefix(files.PREFIX)).isdigit()
            and store.exists(f"{name}/{MANIFEST}")
        ]
        return sorted(steps, reverse=True)

    def _upload(self, folder: Path) -> None:
        store, target = self._store(), f"{self._root}/{folder.name}"
        # Whatever lies there is no checkpoint from here on, and is one again with its new manifest.
        if store.exists(f"{target}/{MANIFEST}"):
            store.rm_file(f"{target}/{MANIFEST}")
        store.makedirs(target, exist_ok=True)
        # The manifest last: until it is there, nobody takes the folder for a checkpoint.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            store.put_file(str(path), f"{target}/{path.name}")

    def _keep_newest(self) -> None:
        store = self._store()
        self._remove_cut_short(store)
        for step in self._steps()[self._settings.keep :]:
            target = f"{self._root}/{files.folder_name(step)}"
            store.rm_file(f"{target}/{MANIFEST}")
            store.rm(target, recursive=True)

    def _remove_cut_short(self, store: Any) -> None:
        """Folders without a manifest: killed uploads. Ours has come to its end, and a run has one uploader."""
        whole = set(self._steps())
        for name in store.ls(self._root, detail=False):
            step = name.rstrip("/").rpartition("/")[2].removeprefix(files.PREFIX)
            if step.isdigit() and int(step) not in whole:
                store.rm(name.rstrip("/"), recursive=True)

    def _download(self, step: int, folder: Path) -> None:
        store, source = self._store(), f"{self._root}/{files.folder_name(step)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        store.get_file(f"{source}/{MANIFEST}", str(folder / MANIFEST))
        try:
            names = list(json.loads((folder / MANIFEST).read_text())["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{folder.name}: its {MANIFEST} cannot be read ({error!r})") from None
        for name in names:
            if Path(name).name != name:
                raise DamagedError(f"{folder.name}: its {MANIFEST} names {name}")
            if store.exists(f"{source}/{name}"):
                store.get_file(f"{source}/{name}", str(folder / name))
