"""Downloads a student's checkpoint from an object store into a local folder. Called by `earlier_run`.

    student.checkpoint_path=gs://BUCKET/CHECKPOINT/     a Hugging Face folder, a run's folder, or one of a run's copies

Files are fetched in ranges, and an interrupted download resumes where it stopped. Complete files are checked against
their size, and their MD5 where the store gives one; a run's checkpoint is checked against its manifest. The next start
fetches only what has changed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import yaml
from filelock import FileLock

from student_trainer.checkpoint import files
from student_trainer.checkpoint.files import MANIFEST, PREFIX, DamagedError, replace_text
from student_trainer.settings import StudentSettings
from teacher_proto.identity import digest
from teacher_proto.process.stages import Stage, stage

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.yaml"
RECORD = ".fetched.json"  # size and store tag of each file, by which a changed file is noticed
READ = {".json", ".safetensors", ".txt", ".model", ".jinja", ".md", ".yaml"}
RANGE = 16 * 2**20
TRIES = 2
_fetched: dict[str, str] = {}  # per process: the store is queried once


@dataclass(frozen=True)
class _File:
    """One remote file. `place`: its path in the local folder. `md5`: hexadecimal, empty if the store gives none."""

    source: str
    place: str
    size: int
    tag: str
    md5: str


def on_this_disk(settings: StudentSettings) -> StudentSettings:
    """The settings with a local folder in place of a URL. OSError if the store can't be reached and no earlier download
    is complete; ValueError if the URL holds no checkpoint or downloads stay damaged.
    """
    url = settings.checkpoint_path
    if "://" not in url:
        return settings
    if url not in _fetched:
        root = Path(settings.cache_folder or Path.home() / ".cache" / "stillhouse" / "checkpoints").expanduser()
        name = url.rstrip("/").rpartition("/")[2]
        _fetched[url] = str(_fetch(url.rstrip("/"), root / f"{name}-{digest(url)[:12]}", settings.storage_options))
    return settings.model_copy(update={"checkpoint_path": _fetched[url]})


def _fetch(url: str, folder: Path, options: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        record = _record(folder)
        try:
            store, there = _listed(url, options)
        except Exception as error:  # each store's library has errors of its own
            if not record.get("complete"):
                raise OSError(f"student.checkpoint_path={url}: {type(error).__name__}: {error}") from error
            logger.warning("can't list %s (%s): using the copy in %s as it is", url, error, folder)
            return folder
        if not there:
            raise ValueError(
                f"student.checkpoint_path={url} holds neither a model's config.json nor a run's checkpoint"
            )
        _download(url, store, there, folder, record)
    return folder


def _listed(url: str, options: Mapping[str, Any]) -> tuple[Any, list[_File]]:
    """The store and the files to fetch; for a run's folder, only the newest of its checkpoints."""
    store, root = fsspec.core.url_to_fs(url, **options)
    store.invalidate_cache()
    found = {
        PurePosixPath(name).relative_to(PurePosixPath(root.rstrip("/"))): (name, info)
        for name, info in store.find(root, detail=True).items()
    }
    steps = {path.parent for path in found if path.parent.name.startswith(PREFIX) and path.name == MANIFEST}
    newest = max(steps, key=lambda path: path.name, default=None)
    kept = []
    for path, (name, info) in sorted(found.items()):
        in_step = next((part for part in path.parents if part.name.startswith(PREFIX)), None)
        exported = path.parts[0] in ("exports", "dumps", "wandb", "tensorboard") and newest is not None
        if path.suffix not in READ or ".." in path.parts or exported or (in_step is not None and in_step != newest):
            continue
        place = path if in_step is None else PurePosixPath("checkpoints", in_step.name, path.name)
        kept.append(_File(name, str(place), int(info["size"]), _tag(info), _md5(info)))
    places = {file.place for file in kept}
    return store, kept if newest is not None or "config.json" in places else []


def _tag(info: Mapping[str, Any]) -> str:
    """A value that changes when the file does: the first of these that the store gives."""
    names = ("md5Hash", "ETag", "etag", "crc32c", "updated", "LastModified", "mtime", "created")
    return next((str(info[name]) for name in names if info.get(name)), "")


def _md5(info: Mapping[str, Any]) -> str:
    # Google Cloud Storage only: an S3 ETag may be computed over parts, or over encrypted data.
    return base64.b64decode(info["md5Hash"]).hex() if info.get("md5Hash") else ""


def _download(url: str, store: Any, there: list[_File], folder: Path, record: dict[str, Any]) -> None:
    had = record.setdefault("files", {})
    for place in had.keys() - {file.place for file in there}:
        (folder / place).unlink(missing_ok=True)
        del had[place]
    missing = [file for file in there if had.get(file.place) != _identity(file) or not _is_whole(folder, file)]
    if not missing:
        _complete(url, there, folder, record)
        return
    with _keeping(folder, record), stage(f"fetching {url}", sum(f.size for f in missing) / 1e6, "MB") as doing:
        record["complete"] = False
        for file in missing:
            if had.get(file.place) != _identity(file):
                # The partial download belongs to an older version of the file.
                _part(folder, file).unlink(missing_ok=True)
                (folder / file.place).unlink(missing_ok=True)
            had[file.place] = _identity(file)
            replace_text(folder / RECORD, json.dumps(record, indent=1))
            _fetch_file(url, store, file, folder, doing)
        _complete(url, there, folder, record)
    logger.info("fetched %d files of %s into %s", len(missing), url, folder)


def _fetch_file(url: str, store: Any, file: _File, folder: Path, doing: Stage) -> None:
    part = _part(folder, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(TRIES):
        size = part.stat().st_size if part.exists() else 0
        if 0 < size < file.size:
            logger.info("resuming %s of %s at byte %s", file.place, url, f"{size:,}")
        doing.done += min(size, file.size) / 1e6
        with part.open("ab") as target:
            while size < file.size:
                data = _range(url, store, file, size)
                target.write(data)
                size += len(data)
                doing.done += len(data) / 1e6
        if size == file.size and (not file.md5 or _md5_of(part) == file.md5):
            part.replace(folder / file.place)
            return
        doing.done -= size / 1e6
        part.unlink()
        logger.warning("%s of %s arrived damaged", file.place, url)
    raise ValueError(f"{file.place} of {url} doesn't match the store's MD5 or size for it: upload it again")


def _range(url: str, store: Any, file: _File, start: int) -> bytes:
    try:
        data: bytes = store.cat_file(file.source, start=start, end=min(start + RANGE, file.size))
    except Exception as error:  # each store's library has errors of its own
        raise OSError(f"{file.place} of {url}: {type(error).__name__}: {error}") from error
    if not data:
        raise OSError(f"{file.place} of {url} ends after {start} bytes, expected {file.size}")
    return data


def _complete(url: str, there: list[_File], folder: Path, record: dict[str, Any]) -> None:
    """Verify a run's checkpoint against its manifest, and write settings.yaml where the remote copy has none."""
    for manifest in (folder / file.place for file in there if file.place.endswith(f"/{MANIFEST}")):
        if not record.get("complete"):
            try:
                files.verify(manifest.parent)
            except DamagedError as error:
                shutil.rmtree(manifest.parent)
                raise ValueError(f"student.checkpoint_path={url}: {error}") from error
        if not (folder / SETTINGS_FILE).exists():
            state = json.loads((manifest.parent / "state.json").read_text())
            replace_text(folder / SETTINGS_FILE, yaml.safe_dump(state["settings"], sort_keys=False))
    if not record.get("complete"):
        record["complete"] = True
        replace_text(folder / RECORD, json.dumps(record, indent=1))


@contextmanager
def _keeping(folder: Path, record: Mapping[str, Any]) -> Iterator[None]:
    """Write the record however the block ends, so that a later start can resume."""
    try:
        yield
    finally:
        replace_text(folder / RECORD, json.dumps(record, indent=1))


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _identity(file: _File) -> list[Any]:
    return [file.size, file.tag]


def _is_whole(folder: Path, file: _File) -> bool:
    path = folder / file.place
    return path.is_file() and path.stat().st_size == file.size


def _part(folder: Path, file: _File) -> Path:
    return folder / f"{file.place}.part"


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
