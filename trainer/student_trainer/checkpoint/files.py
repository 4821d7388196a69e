"""One checkpoint on disk: written atomically, and read only if every byte is as written.

Called by `checkpoints`. A checkpoint is a folder `step-00000500` of safetensors and JSON files with a manifest of their
sizes and sha256. It is written under a temporary name, every file and folder is fsynced, and then it is renamed.
Version 1 has full tensors, in `model.safetensors` and `optimizer.safetensors`; version 2 has shards (`pieces`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from student_trainer.checkpoint.pieces import SHARD, read_shards

VERSION, SHARDED_VERSION = 1, 2
MANIFEST = "manifest.json"
PREFIX = "step-"


class DamagedError(ValueError):
    """A checkpoint that is not as it was written; the message says which file differs and how."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The content of a checkpoint. `tensors`: file name -> name -> tensor; `state`: what JSON can hold exactly."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def unfinished(root: Path, step: int) -> Path:
    """The temporary folder of a checkpoint that is being written."""
    return root / f".unfinished-{folder_name(step)}"


def write(root: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint under `root` and return its folder. An OSError leaves nothing that could be taken for one."""
    begin(root, snapshot.step)
    try:
        return commit(root, snapshot, VERSION, {})
    except OSError:
        shutil.rmtree(unfinished(root, snapshot.step), ignore_errors=True)
        raise


def begin(root: Path, step: int) -> None:
    """Make an empty temporary folder to write a checkpoint into."""
    folder = unfinished(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def commit(root: Path, snapshot: Snapshot, version: int, sealed: Mapping[str, Any]) -> Path:
    """Complete a checkpoint: write the snapshot beside the files that are already `sealed`, then a manifest of all
    files, and rename the folder to its final name, which is returned.
    """
    final, folder = root / folder_name(snapshot.step), unfinished(root, snapshot.step)
    for name, tensors in snapshot.tensors.items():
        save_tensors(tensors, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(snapshot.state, indent=1))
    # Other ranks' shards may not be visible here yet on a network file system: their entries are in `sealed`.
    names = sorted({path.name for path in folder.iterdir()} | sealed.keys())
    files = {name: sealed[name] if name in sealed else seal(folder / name) for name in names}
    manifest = {"version": version, "step": snapshot.step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    # Order on disk: the files, the manifest that lists them, the folder's entries, then the final name.
    seal(folder / MANIFEST)
    sync_folder(folder)
    make_way(final)
    # Within one file system a rename is atomic.
    folder.rename(final)
    # The rename changes an entry of the parent folder.
    sync_folder(root)
    return final


def read(folder: Path) -> Snapshot:
    """The checkpoint in `folder`. DamagedError if it is not as written, ValueError if a later version wrote it."""
    verify(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        paths = sorted(folder.glob("*.safetensors"))
        shards = [path for path in paths if path.name.startswith(SHARD)]
        tensors: dict[str, Mapping[str, Tensor]] = {
            path.stem: safetensors.torch.load_file(path) for path in paths if path not in shards
        }
        if shards:
            tensors |= read_shards(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedError(f"{folder.name}: {error}") from error
    return Snapshot(int(state["step"]), tensors, state)


def verify(folder: Path) -> None:
    """Check every file against the manifest. DamagedError if one differs, ValueError if a later version wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["version"], dict(manifest["files"])
    except FileNotFoundError:
        raise DamagedError(f"{folder.name} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder.name}: its {MANIFEST} cannot be read ({error!r})") from None
    if version not in (VERSION, SHARDED_VERSION):
        raise ValueError(
            f"{folder} was written in version {version} of the checkpoint format, but this trainer reads {VERSION} and "
            f"{SHARDED_VERSION}: use the trainer that wrote it, or a new run.id"
        )
    for name, expected in files.items():
        path = folder / name
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise DamagedError(f"{folder.name}: its {MANIFEST} gives no size and sha256 of {name}")
        if not path.is_file():
            raise DamagedError(f"{folder.name} lacks {name}")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise DamagedError(f"{folder.name}: {name} has {size} bytes, expected {expected['bytes']}")
        if sha256(path) != expected["sha256"]:
            raise DamagedError(f"{folder.name}: {name} is not as it was written, its sha256 differs")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Fsync a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically: after a crash it has the old or the new text."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    seal(fresh)
    fresh.replace(path)
    sync_folder(path.parent)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """`about` goes into the file's header. OSError if it can't be written."""
    try:
        safetensors.torch.save_file(dict(tensors), path, about)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def seal(path: Path) -> dict[str, Any]:
    """Fsync a file and return its entry for the manifest."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def make_way(final: Path) -> None:
    """Move an existing, damaged checkpoint of the same step aside, so that an intact one can take its name."""
    if final.exists():
        aside = final.with_name(f".damaged-{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
