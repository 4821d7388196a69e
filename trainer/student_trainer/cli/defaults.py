"""What a run has where the command line leaves it open: its teacher, its data, and what the recipe would have.

Called by `compose`. The teacher is then the student's original model, if that can be told; what a run began with by
default, it keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from student_trainer.cli.original import original_of
from student_trainer.settings import Settings
from student_trainer.settings.run import RunSettings
from student_trainer.settings.teacher import TeacherSettings

logger = logging.getLogger(__name__)

DATA = "mixed_pretrain"
# Of a teacher: what is set of one that is yet to be chosen.
OF_ANY_TEACHER = {
    "kind", "attention_url", "top_k", "sanity", "same_tokenizer", "tokenizer", "dtype", "device", "max_batch_tokens"
}  # fmt: skip
RECIPE_TOKENS = 2048


def default_data(plain: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """The override that chooses data, where no source is named."""
    if plain["data"].get("sources") or any(name == "data" or name.startswith("data.") for name in given):
        return []
    logger.info("no data are named: data=%s, of the Hugging Face hub", DATA)
    return [f"data={DATA}"]


def default_loss(given: Set[str], unread: Set[str]) -> list[str]:
    """The override that chooses the loss with attention relations, where only their coefficient is given."""
    name = "distillation.gamma_attention"
    if name not in given or name not in unread or given & {"distillation", "recipe"}:
        return []
    logger.info("%s is given and no distillation is chosen: distillation=bitdistill", name)
    return ["distillation=bitdistill"]


def loss_of_classes(plain: Mapping[str, Any], recipe: str | None, given: Collection[str]) -> list[str]:
    """The override that has `recipe=bitdistill` compare student and teacher at the words of classes, where all data
    have classes and nothing else is said of the loss. A run that began otherwise goes on so.
    """
    sources = plain["data"].get("sources") or {}
    chosen = any(name == "distillation" or name.startswith("distillation.terms") for name in given)
    with_classes = [source for source in sources.values() if source.get("format") == "classification"]
    if recipe != "bitdistill" or chosen or not sources or len(with_classes) < len(sources):
        return []
    begun = _begun_with(plain).get("distillation")
    if begun and begun.get("gather_at") != "labels":
        return []
    logger.info("all data have classes: distillation=classification")
    return ["distillation=classification"]


def choose_teacher(plain: dict[str, Any]) -> None:
    """Put the teacher of kind auto into the settings: local or remote."""
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
            "no teacher is named, and %s names no original model in its config or card: the one at %s is asked",
            student.get("checkpoint_path") or "the student", ", ".join(TeacherSettings().url),
        )  # fmt: skip
        return
    name, source = found
    teacher |= {"kind": "local", "model": name}
    logger.info("teacher: %s, the student's original model by %s, in this process", name, source)


def keep_optimizer(plain: dict[str, Any], given: Collection[str]) -> None:
    """A run that began before its recipe chose Muon goes on with the optimizer that it has."""
    begun = _begun_with(plain).get("optim", {})
    if begun and begun["kind"] != plain["optim"]["kind"] and not any(name.startswith("optim") for name in given):
        logger.info("optim.kind stays %s, which the run began with", begun["kind"])
        plain["optim"] = begun


def unlike_recipe(settings: Settings) -> str:
    """What of length and optimizer is not the recipe's, in one line; empty where all is."""
    unlike = []
    if settings.data.seq_len < RECIPE_TOKENS:
        unlike.append(f"data.seq_len is {settings.data.seq_len} (the recipe has {RECIPE_TOKENS:,})")
    if settings.optim.kind != "muon_clip":
        unlike.append(f"optim.kind is {settings.optim.kind} (the recipe has Muon with QK-clip, optim=muon_clip)")
    elif settings.optim.qk_clip.tau is None:
        unlike.append("optim.qk_clip.tau is null (the recipe clips at 100)")
    return ", ".join(unlike)


def _begun_with(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that is in the folder already; empty where there is none."""
    run = plain.get("run", {})
    name = run.get("id")
    path = Path(str(run.get("root", RunSettings().root))) / str(name) / "settings.yaml"
    if name is None or run.get("resume") == "never" or not path.is_file():
        return {}
    begun = yaml.safe_load(path.read_text())
    return begun if isinstance(begun, dict) else {}
