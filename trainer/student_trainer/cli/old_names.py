"""Translates settings' names in older trainers into current ones. Called by `compose` before anything is checked.

Each old name becomes overrides with current names, and a line of the log says which. A choice that the command line
makes under a current name takes precedence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

logger = logging.getLogger(__name__)

# Arguments: the value as text and as Hydra parsed it, and all old names on the command line with their values.
Rename = Callable[[str, Any, Mapping[str, Any]], list[str]]
OPTIMIZERS = {"muon": "muon_clip", "muonclip": "muon_clip", "muon_clip": "muon_clip", "adamw": "adamw"}

TRAININGS = {"lrc_calibration": "lrc"}  # old name of a recipe -> current one


def _served(old: Mapping[str, Any]) -> bool:
    return bool(old.get("teacher.use_vllm", "teacher.vllm_url" in old))


def _teacher_model(text: str, value: Any, old: Mapping[str, Any]) -> list[str]:
    # A served teacher states its identity.
    return [] if _served(old) else ["teacher=local", f"teacher.model={text}"]


def _use_vllm(text: str, value: Any, old: Mapping[str, Any]) -> list[str]:
    if value:
        return ["teacher=remote"]
    return ["teacher=local" if "teacher.model_name" in old else "teacher=auto"]


def _vllm_url(text: str, value: Any, old: Mapping[str, Any]) -> list[str]:
    return ["teacher=remote", f"teacher.url={text}"] if _served(old) else []


def _optimizer(text: str, value: Any, old: Mapping[str, Any]) -> list[str]:
    if str(value).lower() not in OPTIMIZERS:
        raise ValueError(f"optimizer.type={value}: expected one of {', '.join(OPTIMIZERS)}")
    return [f"optim={OPTIMIZERS[str(value).lower()]}"]


def _clipping(text: str, value: Any, old: Mapping[str, Any]) -> list[str]:
    return [f"optim.qk_clip.tau={100.0 if value else 'null'}"]


def _training(text: str, value: Any, old: Mapping[str, Any]) -> list[str]:
    if value not in TRAININGS:
        raise ValueError(f"training={value}: expected one of {', '.join(TRAININGS)}")
    return [f"recipe={TRAININGS[value]}"]


def _influence(text: str, value: Any, old: Mapping[str, Any]) -> list[str]:
    return ["data.mixture.policy=influence"] if value is True else []


def _of_influence(field: str) -> Rename:
    """A setting of the old section `influence`, dropped unless influence.enabled is true."""
    return lambda text, value, old: [f"data.mixture.{field}={text}"] if old.get("influence.enabled") is True else []


RENAMED: dict[str, Rename] = {
    "influence.enabled": _influence,
    "training": _training,
    "teacher.model_name": _teacher_model,
    "teacher.use_vllm": _use_vllm,
    "teacher.vllm_url": _vllm_url,
    "teacher.say_every_s": lambda text, value, old: [f"teacher.log_every_s={text}"],
    "teacher.give_up_after_s": lambda text, value, old: [f"teacher.outage_timeout_s={text}"],
    "optimizer": _optimizer,
    "optimizer.type": _optimizer,
    "optimizer.enable_clipping": _clipping,
    "optimizer.lr": lambda text, value, old: [f"optim.learning_rate={text}"],
    "data.config_name": lambda text, value, old: [f"data={text}"],
}
SECTIONS = {"optimizer.": "optim."}  # renamed sections, whose other settings kept their names


def renamed(overrides: Sequence[Override]) -> list[str]:
    """The overrides with current names only. ValueError for a value that an old name never had."""
    old = {each.key_or_group: each.value() for each in overrides if _rename_of(each.key_or_group) is not None}
    kept = [str(each.input_line) for each in overrides if each.key_or_group not in old]
    chosen = {each.key_or_group for each in overrides} - old.keys()
    for override in overrides:
        if (rename := _rename_of(override.key_or_group)) is None:
            continue
        text = str(override.input_line).partition("=")[2]
        new = rename(text, override.value(), old)
        new = [each for each in dict.fromkeys(new) if each.partition("=")[0] not in chosen]
        kept += [each for each in new if each not in kept]
        logger.info("%s is now %s", override.input_line, " ".join(new) if new else _without_need(override))
    return kept


def _rename_of(name: str) -> Rename | None:
    if name in RENAMED:
        return RENAMED[name]
    if name.startswith("influence."):
        return _of_influence(name.removeprefix("influence."))
    for before, now in SECTIONS.items():
        if name.startswith(before):
            return lambda text, value, old: [f"{now}{name.removeprefix(before)}={text}"]
    return None


def _without_need(override: Override) -> str:
    if override.key_or_group == "teacher.model_name":
        return "unnecessary: the teacher at teacher.url reports its identity"
    return "unnecessary, given the other settings"
