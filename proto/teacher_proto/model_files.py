"""A model on this disk, and its identity as computed from the files in its folder.

Engines and the trainer's local teacher call `find_model` before they load it, `hash_files` meanwhile and `identify`
afterwards. Files are hashed in parallel. Hashes are cached by path, size, inode and times in the user's cache folder,
so that a restart does not read the weights again to hash them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_proto.identity import (
    NumericIdentity,
    SemanticIdentity,
    TeacherIdentity,
    digest,
    file_sha256,
    tokenizer_sha256,
)

_HASH_THREADS = 8
_MODELOPT_FILE = "hf_quant_config.json"  # read besides config.json
_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json")  # of GPTQ and AWQ, read if config.json says nothing
_SETTLED_NS = 2 * 10**9
_WANTED_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelFolder:
    """A model on this disk: its folder, its name in the identity, and its revision ("local" if unknown)."""

    path: Path
    name: str
    revision: str
    config: dict[str, Any]

    @property
    def dtype(self) -> str:
        """The dtype of the saved weights, from config.json or else from the first tensor of the first file."""
        text = self.config.get("text_config") or self.config
        named = text.get("dtype") or text.get("torch_dtype") or self.config.get("dtype")
        return str(named) if named else _first_dtype(self.weight_files[0])

    @property
    def weight_files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))


def _first_dtype(path: Path) -> str:
    """The dtype of the first tensor in a safetensors file, which begins with the length of a JSON header in 8 bytes."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    first = next(entry["dtype"] for name, entry in header.items() if name != "__metadata__")
    return _DTYPE_NAMES.get(first, first)


def find_model(model: str, *, revision: str | None = None, name: str | None = None) -> ModelFolder:
    """The folder of `model`: a path, or a hub id, which is downloaded (or found in the cache) at `revision`.

    `name` replaces the folder's or hub's name in the identity. ValueError if there is no such model, or its weights are
    not safetensors.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _download(model, revision)
    elif revision is not None:
        raise ValueError(f"revision {revision!r} is for a hub id, but {model} is a folder: leave it out")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{model}: no config.json in {path.name}; expected a folder saved by transformers")
    found_name, found_revision = _origin(path.resolve())
    folder = ModelFolder(path, name or found_name, found_revision, json.loads(config_file.read_text()))
    if not folder.weight_files:
        raise ValueError(f"{model}: no *.safetensors file; other formats can run code when loaded and are not read")
    return folder


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        # A string that is not a valid hub id was meant as a folder: the hub's naming rules would only confuse.
        why = "no such folder" if isinstance(error, HFValidationError) else str(error).strip().partition("\n")[0]
        raise ValueError(f"{model!r} is neither a folder nor a model available from the hub: {why}") from error


def _origin(path: Path) -> tuple[str, str]:
    """Name and revision: both from the path of a folder in the hub's cache, otherwise the folder's name and "local"."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name
    return path.name, "local"


def identify(
    folder: ModelFolder,
    weights: Mapping[str, str],
    *,
    dtype: str,
    quantization: str | None,
    vocab_size: int,
    numeric: NumericIdentity,
    options: Mapping[str, str] | None = None,
) -> TeacherIdentity:
    """The identity of a teacher that was loaded from `folder` with `dtype` and `quantization`. `weights` and `options`
    are as in `SemanticIdentity`; separate files that say how the weights are quantised are added to the options."""
    read = (_MODELOPT_FILE, *(() if "quantization_config" in folder.config else _QUANTISATION_FILES))
    quantised = {name: file_sha256(folder.path / name) for name in read if (folder.path / name).is_file()}
    semantic = SemanticIdentity(
        model=folder.name,
        revision=folder.revision,
        config_sha256=file_sha256(folder.path / "config.json"),
        tokenizer_sha256=tokenizer_sha256(_vocabulary(folder.path)),
        weights=weights,
        dtype=dtype,
        quantization=quantization,
        vocab_size=vocab_size,
        options={**(options or {}), **quantised},
    )
    return TeacherIdentity(semantic=semantic, numeric=numeric)


def _vocabulary(path: Path) -> dict[int, str]:
    """Tokens by id; empty for a model without a tokenizer."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return {i: token for token, i in tokenizer.get_vocab().items()}


def hash_files(paths: list[Path], cache_file: Path | None = None) -> dict[str, str]:
    """sha256 of each file by its name, from the cache if the file has not changed since it was hashed."""
    cache_file = cache_file or _cache_folder() / "sha256.json"
    known = _read_cache(cache_file)
    keys = {path: _key(path) for path in paths}
    unknown = [path for path in paths if keys[path] not in known]
    with ThreadPoolExecutor(_HASH_THREADS) as threads:
        fresh = dict(zip((keys[path] for path in unknown), threads.map(file_sha256, unknown), strict=True))
    settled = {keys[path]: fresh[keys[path]] for path in unknown if _key(path) == keys[path] and _is_settled(path)}
    if settled:
        _write_cache(cache_file, known | settled)
    return {path.name: (known | fresh)[keys[path]] for path in paths}


def _key(path: Path) -> str:
    """A key that changes whenever the file is replaced or written to, even if its modification time is preserved:
    programs can set mtime, but only the kernel sets ctime."""
    state = path.stat()
    return digest([str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino])


def _is_settled(path: Path) -> bool:
    """Whether any later change would show in the file's times, whose resolution on some file systems is coarse."""
    return abs(time.time_ns() - path.stat().st_ctime_ns) > _SETTLED_NS


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"


def _read_cache(cache_file: Path) -> dict[str, str]:
    try:
        known = json.loads(cache_file.read_text())
    except (OSError, ValueError):
        return {}  # absent or corrupt: the files are hashed again
    return known if isinstance(known, dict) else {}


def _write_cache(cache_file: Path, known: dict[str, str]) -> None:
    """Replace the cache atomically. If the folder can't be written, the files are hashed again at the next start."""
    temporary = cache_file.with_suffix(f".{os.getpid()}")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known))
        temporary.replace(cache_file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
