"""The model that a student was made of, found from its settings, its config or its model card. Called by `defaults`.

Reads small files of a folder, the hub or an object store, and imports no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import httpx
import yaml

from student_trainer.settings.student import with_new_names

logger = logging.getLogger(__name__)

# Entries of a config that make it a student's: quantised, or one that fills in masked tokens.
OF_STUDENTS = ("student_quantisation", "bitnet_student", "quantization_config", "diffusion")
NAMING = ("original_model", "base_model", "base_model_name_or_path", "_name_or_path")


def original_of(student: Mapping[str, Any]) -> tuple[str, str] | None:
    """Folder or hub name of the original of the student with these settings, and by what it is told."""
    student = with_new_names(student)
    path = str(student.get("checkpoint_path") or "")
    revision, options = student.get("revision"), student.get("storage_options") or {}
    told = "its settings"
    taken = ("none", "causal", "auto")  # as it is in the checkpoint
    made_here = student.get("quantiser", "none") not in taken or student.get("architecture", "causal") not in taken
    seen = set[str]()
    while path not in seen and (earlier := _settings_of_run(path, options)) is not None:
        seen.add(path)
        path, revision = str(earlier.get("checkpoint_path") or ""), earlier.get("revision")
        told, made_here = "the run that it comes from", True
    if not path:
        return None
    config = _config(path, revision, options)
    if config is None:
        return None
    if made_here and not any(config.get(entry) for entry in OF_STUDENTS):
        return None if "://" in path else (path, told)
    for name in NAMING:
        if _is_another(config.get(name), path):
            return str(config[name]), f"{name} of its config"
    base = _card(path, revision, options).get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return (str(base), "base_model of its model card") if _is_another(base, path) else None


def _is_another(name: Any, path: str) -> bool:
    """Whether it is a model's name: a folder that is there, or OWNER/NAME of the hub."""
    if not isinstance(name, str) or not name or name.rstrip("/") == path.rstrip("/"):
        return False
    return Path(name).is_dir() or (name.count("/") == 1 and not name.startswith(("/", ".", "~")))


def _settings_of_run(path: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section `student` of the run in the folder, None if it is no run's."""
    text = _read(path, "settings.yaml", None, options) if "://" in path or Path(path).is_dir() else None
    if text is None and "://" in path:
        text = _newest_state(path, options)
    if text is None:
        return None
    settings = yaml.safe_load(text)
    student = settings.get("settings", settings).get("student")
    return with_new_names(student) if isinstance(student, dict) else {}


def _newest_state(url: str, options: Mapping[str, Any]) -> str | None:
    """What the newest checkpoint of a run's copy says of it; such a copy has no settings.yaml."""
    try:
        store, root = fsspec.core.url_to_fs(url.rstrip("/"), **options)
        steps = [name for name in store.ls(root, detail=False) if "/step-" in name]
        return str(store.cat_file(f"{max(steps).rstrip('/')}/state.json").decode()) if steps else None
    except Exception as error:  # each store's library has errors of its own
        logger.info("%s can't be read: %s", url, error)
        return None


def _config(path: str, revision: str | None, options: Mapping[str, Any]) -> dict[str, Any] | None:
    text = _read(path, "config.json", revision, options)
    try:
        config = json.loads(text) if text else None
    except json.JSONDecodeError:
        return None
    return config if isinstance(config, dict) else None


def _card(path: str, revision: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter of README.md."""
    text = _read(path, "README.md", revision, options) or ""
    parts = text.split("---\n", 2)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        front = None
    return front if isinstance(front, dict) else {}


def _read(path: str, name: str, revision: str | None, options: Mapping[str, Any]) -> str | None:
    if "://" in path:
        return _read_url(f"{path.rstrip('/')}/{name}", options)
    if Path(path).is_dir():
        file = Path(path) / name
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    if path.count("/") != 1 or path.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(path, name, revision=revision)).read_text(encoding="utf-8", errors="replace")
    except (OSError, HFValidationError, httpx.HTTPError) as error:
        logger.info("%s of %s can't be read: %s", name, path, str(error).strip().splitlines()[0])
        return None


def _read_url(url: str, options: Mapping[str, Any]) -> str | None:
    try:
        store, path = fsspec.core.url_to_fs(url, **options)
        return str(store.cat_file(path).decode("utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except Exception as error:  # each store's library has errors of its own
        logger.info("%s can't be read: %s", url, error)
        return None
