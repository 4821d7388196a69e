"""Copies of a run's checkpoints at any fsspec URL. Built by `build`; `checkpoints` uploads to it.

    URL/RUN_ID/step-00000500/manifest.json, model.safetensors, ...

A completed checkpoint is uploaded in the background, its manifest last. A run that starts without it downloads it into
its folder and verifies it against the manifest. If the store is down, the copy is missing, but training goes on.
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
    """The remote checkpoints of run `run_id` under `settings.url`, uploaded by a background thread."""

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
        """Upload a completed checkpoint in the background. It replaces one that is still waiting."""
        with self._wake:
            self._waiting = folder
            self._wake.notify_all()

    def needs(self, folder: Path) -> bool:
        """Whether the folder must be kept because its upload is waiting or in progress."""
        return folder in (self._waiting, self._uploading)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, newest first. OSError if the store cannot be reached."""
        return self._asking(self._steps)

    def pull(self, root: Path, beyond: int, name: str) -> None:
        """Download the newest intact checkpoint of a step after `beyond` into `root`, if there is one.

        `name` distinguishes processes that may download at the same time. OSError if the store cannot be reached; a
        damaged checkpoint is skipped and logged as an error.
        """
        for step in self.steps():
            if step <= beyond:
                return
            unfinished = root / f".download-{name}-{files.folder_name(step)}"
            try:
                self._asking(self._download, step, unfinished)
                files.verify(unfinished)
            except DamagedError as error:
                logger.error("skipping a damaged checkpoint: %s (in %s). Trying the one before it", error, self.url)
                shutil.rmtree(unfinished, ignore_errors=True)
                continue
            files.make_way(root / files.folder_name(step))
            unfinished.rename(root / files.folder_name(step))
            files.sync_folder(root)
            logger.info("downloaded the checkpoint of step %d from %s", step, self.url)
            return

    def close(self) -> None:
        """Wait for pending uploads, but at most `upload_within_s`."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join(self._settings.upload_within_s)
        if self._thread.is_alive():
            logger.error(
                "the last checkpoint is not in %s: its upload took longer than checkpoint.upload_within_s=%g. It is in "
                "the run's folder", self.url, self._settings.upload_within_s,
            )  # fmt: skip

    def _work(self) -> None:
        while (folder := self._next()) is not None:
            started = time.monotonic()
            try:
                self._upload(folder)
                self._keep_newest(int(folder.name.removeprefix(files.PREFIX)))
            except Exception as error:  # fsspec backends may raise anything, and the thread must survive it
                logger.error(
                    "uploading checkpoint %s to %s failed: %s: %s. Training continues; the next one is uploaded when "
                    "it is saved", folder.name, self.url, type(error).__name__, error,
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
        """Raise OSError for whatever the store's library raises: each has errors of its own."""
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
        # Without its manifest an existing folder is no checkpoint while its files are replaced.
        if store.exists(f"{target}/{MANIFEST}"):
            store.rm_file(f"{target}/{MANIFEST}")
        store.makedirs(target, exist_ok=True)
        # The manifest last: the folder counts as a checkpoint only once it is there.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            store.put_file(str(path), f"{target}/{path.name}")

    def _keep_newest(self, uploaded: int) -> None:
        """Remove all but the newest up to `uploaded`. Later ones are damaged, or the run would have resumed from them:
        they don't count as kept.
        """
        store = self._store()
        self._remove_cut_short(store)
        for step in [step for step in self._steps() if step <= uploaded][self._settings.keep :]:
            target = f"{self._root}/{files.folder_name(step)}"
            store.rm_file(f"{target}/{MANIFEST}")
            store.rm(target, recursive=True)

    def _remove_cut_short(self, store: Any) -> None:
        """Remove folders without a manifest, left by killed uploads: ours is finished, and a run has one uploader."""
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
                raise DamagedError(f"{folder.name}: its {MANIFEST} names {name}, expected a file name without a folder")
            if store.exists(f"{source}/{name}"):
                store.get_file(f"{source}/{name}", str(folder / name))
