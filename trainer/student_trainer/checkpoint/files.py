"""One checkpoint on disk: written so that it is there whole or not at all, read only if every byte is as written.

Called by `checkpoints`. A checkpoint is a folder `step-00000500` of safetensors and JSON files with a manifest of their
sizes and sha256. It is made under another name, every file and folder is forced to the disk, and then it is renamed.
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

VERSION = 1
MANIFEST = "manifest.json"
PREFIX = "step-"


class DamagedError(ValueError):
    """A checkpoint that is not as it was written; the message says which file and how."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run at rest. `tensors`: file name -> name -> tensor; `state`: what JSON holds exactly."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def write(root: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint under `root` and return its folder. OSError leaves nothing that could be taken for one."""
    final = root / folder_name(snapshot.step)
    unfinished = root / f".unfinished-{final.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for name, tensors in snapshot.tensors.items():
            _save_tensors(tensors, unfinished / f"{name}.safetensors")
        (unfinished / "state.json").write_text(json.dumps(snapshot.state, indent=1))
        files = sorted(unfinished.iterdir())
        manifest = {"version": VERSION, "step": snapshot.step, "files": {path.name: _sealed(path) for path in files}}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sealed(unfinished / MANIFEST)
        sync_folder(unfinished)
        make_way(final)
        unfinished.rename(final)
        sync_folder(root)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def read(folder: Path) -> Snapshot:
    """The checkpoint in `folder`. DamagedError if it is not as written, ValueError if a later version wrote it."""
    verify(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        tensors = {path.stem: safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")}
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedError(f"{folder.name}: {error}") from error
    return Snapshot(int(state["step"]), tensors, state)


def verify(folder: Path) -> None:
    """Hold every file against the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["version"], dict(manifest["files"])
    except FileNotFoundError:
        raise DamagedError(f"{folder.name} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder.name}: its {MANIFEST} cannot be read ({error!r})") from None
    if version != VERSION:
        raise ValueError(
            f"{folder} was written in version {version} of the checkpoint format, this trainer reads {VERSION}: "
            "use the trainer that wrote it, or a new run.id"
        )
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{folder.name} lacks {name}")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise DamagedError(f"{folder.name}: {name} has {size} bytes, {expected['bytes']} were written")
        if sha256(path) != expected["sha256"]:
            raise DamagedError(f"{folder.name}: {name} is not what was written, its sha256 differs")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file whole: old or new after any crash."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    _sealed(fresh)
    fresh.replace(path)
    sync_folder(path.parent)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def _sealed(path: Path) -> dict[str, Any]:
    """Force a file to the disk; its entry in the manifest."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def make_way(final: Path) -> None:
    """Move a damaged checkpoint of the same step aside; its name shall not stand in the way of a sound one."""
    if final.exists():
        aside = final.with_name(f".damaged-{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
