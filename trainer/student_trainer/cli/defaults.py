"""Chooses what the command line leaves open: the teacher, the data, and what depends on the recipe.

Called by `compose`. The default teacher is the student's original model, if its settings, config or model card name
one; a run keeps the defaults that it began with. Reads small files from a folder, the hub or an object store, and
imports no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import fsspec
import httpx
import yaml

from student_trainer.settings import Settings
from student_trainer.settings.run import RunSettings
from student_trainer.settings.student import with_new_names
from student_trainer.settings.teacher import TeacherSettings

logger = logging.getLogger(__name__)

# Entries of a config that only a student has: one that is quantised, or fills in masked tokens.
OF_STUDENTS = ("student_quantisation", "bitnet_student", "quantization_config", "diffusion")
NAMING = ("original_model", "base_model", "base_model_name_or_path", "_name_or_path")


def original_of(student: Mapping[str, Any]) -> tuple[str, str] | None:
    """Folder or hub name of the original model of the student with these settings, and where that is stated."""
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
    """Whether `name` is that of another model than `path`: an existing folder, or OWNER/NAME on the hub."""
    if not isinstance(name, str) or not name or name.rstrip("/") == path.rstrip("/"):
        return False
    return Path(name).is_dir() or (name.count("/") == 1 and not name.startswith(("/", ".", "~")))


def _settings_of_run(path: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section `student` of the run in the folder; None if it is not the folder of a run."""
    text = _read(path, "settings.yaml", None, options) if "://" in path or Path(path).is_dir() else None
    if text is None and "://" in path:
        text = _newest_state(path, options)
    if text is None:
        return None
    settings = yaml.safe_load(text)
    student = settings.get("settings", settings).get("student")
    return with_new_names(student) if isinstance(student, dict) else {}


def _newest_state(url: str, options: Mapping[str, Any]) -> str | None:
    """The state.json of the newest checkpoint in a run's remote copy, which has no settings.yaml."""
    try:
        store, root = fsspec.core.url_to_fs(url.rstrip("/"), **options)
        steps = [name for name in store.ls(root, detail=False) if "/step-" in name]
        return str(store.cat_file(f"{max(steps).rstrip('/')}/state.json").decode()) if steps else None
    except Exception as error:  # each store's library has its own errors
        logger.info("cannot read %s: %s", url, error)
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
        logger.info("cannot read %s of %s: %s", name, path, str(error).strip().splitlines()[0])
        return None


def _read_url(url: str, options: Mapping[str, Any]) -> str | None:
    try:
        store, path = fsspec.core.url_to_fs(url, **options)
        return str(store.cat_file(path).decode("utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except Exception as error:  # each store's library has its own errors
        logger.info("cannot read %s: %s", url, error)
        return None


DATA = "mixed_pretrain"
# The settings of a teacher that may be set before its kind is chosen.
OF_ANY_TEACHER = {
    "kind", "attention_url", "top_k", "sanity", "same_tokenizer", "tokenizer", "dtype", "device", "max_batch_tokens"
}  # fmt: skip
RECIPE_TOKENS = 2048


def default_data(plain: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """The override that chooses data if no source is named."""
    if plain["data"].get("sources") or any(name == "data" or name.startswith("data.") for name in given):
        return []
    logger.info("no data is given: using data=%s, from the Hugging Face hub", DATA)
    return [f"data={DATA}"]


def default_loss(given: Set[str], unread: Set[str]) -> list[str]:
    """The override that chooses a loss with attention relations if only their coefficient is given."""
    name = "distillation.gamma_attention"
    if name not in given or name not in unread or given & {"distillation", "recipe"}:
        return []
    logger.info("%s is given, but no distillation is chosen: using distillation=bitdistill", name)
    return ["distillation=bitdistill"]


def loss_of_classes(plain: Mapping[str, Any], recipe: str | None, given: Collection[str]) -> list[str]:
    """The override that has `recipe=bitdistill` compare student and teacher at the words of the classes, if all data
    have classes and the command line does not choose the loss. A run that began with another loss keeps it.
    """
    sources = plain["data"].get("sources") or {}
    chosen = any(name == "distillation" or name.startswith("distillation.terms") for name in given)
    with_classes = [source for source in sources.values() if source.get("format") == "classification"]
    if recipe != "bitdistill" or chosen or not sources or len(with_classes) < len(sources):
        return []
    begun = _begun_with(plain).get("distillation")
    if begun and begun.get("gather_at") != "labels":
        return []
    logger.info("all sources have classes: using distillation=classification")
    return ["distillation=classification"]


def choose_teacher(plain: dict[str, Any]) -> None:
    """Replace teacher.kind auto by local or remote, in place."""
    teacher = plain["teacher"]
    if teacher["kind"] != "auto":
        return
    teacher["kind"] = "remote"
    if teacher.keys() - OF_ANY_TEACHER or _begun_with(plain).get("teacher", {}).get("kind") == "remote":
        return
    student = plain.get("student", {})
    found = original_of(student)
    if found is None:
        logger.info(
            "no teacher is given, and %s names no original model in its config or model card: using the teacher at %s",
            student.get("checkpoint_path") or "the student", ", ".join(TeacherSettings().url),
        )  # fmt: skip
        return
    name, source = found
    teacher |= {"kind": "local", "model": name}
    logger.info("teacher: %s, the student's original model according to %s, in this process", name, source)


def keep_optimizer(plain: dict[str, Any], given: Collection[str]) -> None:
    """A run that began before its recipe chose Muon keeps its optimizer."""
    begun = _begun_with(plain).get("optim", {})
    if begun and begun["kind"] != plain["optim"]["kind"] and not any(name.startswith("optim") for name in given):
        logger.info("keeping optim.kind %s, which the run began with", begun["kind"])
        plain["optim"] = begun


def unlike_recipe(settings: Settings) -> str:
    """One line on how length and optimizer differ from the recipe; empty if they do not."""
    unlike = []
    if settings.data.seq_len < RECIPE_TOKENS:
        unlike.append(f"data.seq_len is {settings.data.seq_len} (the recipe uses {RECIPE_TOKENS:,})")
    if settings.optim.kind != "muon_clip":
        unlike.append(f"optim.kind is {settings.optim.kind} (the recipe uses Muon with QK-clip, optim=muon_clip)")
    elif settings.optim.qk_clip.tau is None:
        unlike.append("optim.qk_clip.tau is null (the recipe clips at 100)")
    return ", ".join(unlike)


def _begun_with(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that already exists in the folder; empty if there is none."""
    run = plain.get("run", {})
    name = run.get("id")
    path = Path(str(run.get("root", RunSettings().root))) / str(name) / "settings.yaml"
    if name is None or run.get("resume") == "never" or not path.is_file():
        return {}
    begun = yaml.safe_load(path.read_text())
    return begun if isinstance(begun, dict) else {}
