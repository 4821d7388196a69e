"""Finds and opens a source's files: folders, globs and compression at any fsspec URL.

Used by `records`, which turns them into documents, and by `index` and `streamed`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from student_trainer.settings.data import SourceSettings

CHUNK_BYTES = 8 << 20
TELLING = ("sha256", "md5Hash", "content_md5", "ETag", "etag", "blob_id", "crc32c")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
EXTENSIONS = {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet", ".pq")}


@dataclass(frozen=True)
class DataFile:
    """A file to read. `version` changes with its content (size with mtime or etag), as far as the store can tell.

    `told`: the store's etag or hash of the content; None if it gives none. `written`: a value that changes when the
    file is written to.
    """

    url: str
    size: int
    version: str
    told: str | None = None
    written: str = ""

    @property
    def local_path(self) -> Path | None:
        """Its path if it is on this disk, else None."""
        return Path(self.url.removeprefix("file://")) if self.url.startswith("file://") else None


def find_files(settings: SourceSettings) -> list[DataFile]:
    """All files that `settings.path` names, sorted by URL; folders are searched recursively. ValueError if a path has
    none.
    """
    found: dict[str, DataFile] = {}
    for path in settings.path:
        files = _find(path, settings)
        if not files:
            raise ValueError(
                f"no {settings.kind} file at {path!r}; expected a file, a glob, or a folder with "
                f"{', '.join(EXTENSIONS.get(settings.kind, ('files',)))} in it, compressed or not"
            )
        found |= {file.url: file for file in files}
    return [found[url] for url in sorted(found)]


def _find(path: str, settings: SourceSettings) -> list[DataFile]:
    try:
        fs, root = fsspec.core.url_to_fs(path, **settings.storage_options)
        if "*" in root or "?" in root:
            names = fs.glob(root)
        elif fs.isdir(root):
            names = [name for name in fs.find(root) if _wanted(name, root, settings.kind)]
        else:
            names = [root] if fs.exists(root) else []
        infos = {name: fs.info(name) for name in names}
    except ImportError as error:
        raise ValueError(f"cannot open {path!r}: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot list {path!r}: {type(error).__name__}: {error}") from error
    return [
        DataFile(
            fs.unstrip_protocol(name), int(info["size"] or 0), str(fs.ukey(name)), _told(info), _written(fs, name, info)
        )
        for name, info in infos.items()
        if info["type"] == "file"
    ]


def check_unchanged(file: DataFile, settings: SourceSettings) -> None:
    """ValueError if the file was written to since it was found: the run's fingerprint would no longer describe it."""
    try:
        fs, path = fsspec.core.url_to_fs(file.url, **settings.storage_options)
        written = _written(fs, path, fs.info(path))
    except OSError as error:
        raise ValueError(f"cannot read {file.url}: {type(error).__name__}: {error}") from error
    if written != file.written:
        raise ValueError(
            f"{file.url} has changed since the run opened it: restore the original data and start the run again"
        )


def _written(fs: Any, path: str, info: Mapping[str, Any]) -> str:
    """For a local file, size, mtime and inode; without ctime, which a backup's hard link changes as well."""
    return f"{info['size']}:{info['mtime']}:{info['ino']}" if "ino" in info else str(fs.ukey(path))


def _told(info: Mapping[str, Any]) -> str | None:
    """The content's hash or etag from a listing, under the names that stores use; the hub's LFS files have a sha256."""
    lfs = info.get("lfs")
    if lfs is not None and (found := getattr(lfs, "sha256", None)):
        return str(found)
    return next((str(info[name]) for name in TELLING if info.get(name)), None)


def _wanted(name: str, root: str, kind: str) -> bool:
    inner = name.removeprefix(root)
    if any(part.startswith(".") for part in inner.split("/")):
        return False
    for suffix in COMPRESSED:
        inner = inner.removesuffix(suffix)
    return inner.endswith(EXTENSIONS.get(kind, ""))


@contextmanager
def open_file(file: DataFile, settings: SourceSettings) -> Iterator[Any]:
    """The file's bytes, decompressed according to its extension. A truncated file raises OSError or EOFError."""
    # fsspec's reader takes a truncated Zstandard file for a complete one; Arrow's does not.
    is_zstandard = file.url.endswith(".zst")
    with fsspec.open(
        file.url, "rb", compression=None if is_zstandard else "infer", **settings.storage_options
    ) as binary:
        yield pa.CompressedInputStream(binary, "zstd") if is_zstandard else binary


def decode(data: bytes, settings: SourceSettings) -> str:
    """Decode UTF-8, handling errors as the source's settings say."""
    return data.decode("utf-8", settings.encoding_errors)


def chunks(file: DataFile, settings: SourceSettings, separator: bytes) -> Iterator[tuple[bytes, int]]:
    """Chunks of about CHUNK_BYTES that end at a separator, each with the number of its first line, from 1."""
    line, rest = 1, b""
    with open_file(file, settings) as binary:
        while data := binary.read(CHUNK_BYTES):
            rest += data
            cut = rest.rfind(separator)
            if cut >= 0:
                chunk, rest = rest[: cut + len(separator)], rest[cut + len(separator) :]
                yield chunk, line
                line += chunk.count(b"\n")
    if rest.strip():
        yield rest, line
