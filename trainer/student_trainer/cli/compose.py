"""Composes `Settings` from YAML groups and overrides on the command line. Called by `main`.

Hydra composes, pydantic validates. Names of older trainers are translated (`old_names`). Every override is checked
against the settings first, so that the error for a misspelt name suggests the nearest one. What is left open is chosen
(`defaults`), and a setting without effect logs a warning (`effects`).
"""

from __future__ import annotations

import difflib
import logging
import types
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from student_trainer.cli.defaults import (
    choose_teacher,
    default_data,
    default_loss,
    keep_optimizer,
    loss_of_classes,
    unlike_recipe,
)
from student_trainer.cli.effects import PRESET_NAMES, names_without_effect, without_effect
from student_trainer.cli.help import CONFIG, groups, sections_in, settings_by_name
from student_trainer.cli.old_names import renamed
from student_trainer.settings import Settings
from student_trainer.settings.redact import remember
from student_trainer.settings.student import NO_STUDENT, OLD_NAMES

logger = logging.getLogger(__name__)


def compose_arguments(arguments: Sequence[str]) -> Settings:
    """The settings of a run from a command line: overrides, and `--config-folder DIR`. ValueError as in `compose`, and
    if no student is named: the libraries that would notice it take seconds to import.
    """
    overrides, folder = split_config_folder(arguments)
    settings = compose(overrides, folder)
    if not settings.student.checkpoint_path and not settings.student.tokenizer:
        raise ValueError(NO_STUDENT)
    return settings


def compose(overrides: list[str], config_folder: Path | None = None) -> Settings:
    """The settings of a run. `config_folder` holds the user's groups, in addition to the built-in ones.

    ValueError with one clear sentence for an invalid name or value. Settings without effect log a warning.
    """
    parsed = _parse(renamed(_parse(overrides)))
    given = {_with_new_name(override.key_or_group) for override in parsed}
    folders = [CONFIG, *([config_folder.resolve()] if config_folder else [])]
    arguments = [_checked(override, folders) for override in parsed]
    if config_folder is not None:
        if not config_folder.is_dir():
            raise ValueError(f"--config-folder {config_folder}: no such folder")
        arguments.append(f"hydra.searchpath=[file://{config_folder.resolve()}]")
    plain, unread = _composed(arguments)
    recipe = next((str(override.value()) for override in parsed if override.key_or_group == "recipe"), None)
    of_classes = loss_of_classes(plain, recipe, given)
    if chosen := [*default_data(plain, given), *default_loss(given, unread), *of_classes]:
        plain, unread = _composed([*arguments, *chosen])
    keep_optimizer(plain, given)
    if plain["teacher"]["kind"] == "auto":
        # A misspelt setting is reported before anything is requested from the hub.
        validated({**plain, "teacher": {**plain["teacher"], "kind": "remote"}})
        choose_teacher(plain)
    settings = validated(plain)
    remember(settings)
    for warning in (*without_effect(settings, given), *names_without_effect(given, unread)):
        warnings.warn(warning, stacklevel=2)
    if unlike := unlike_recipe(settings):
        logger.info("%s", unlike)
    return settings


def _composed(arguments: list[str]) -> tuple[dict[str, Any], set[str]]:
    """The composed settings as plain containers, and the PRESET_NAMES that no term refers to."""
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG)):
            composed = hydra_compose("config", overrides=arguments)
        written = str(OmegaConf.to_container(composed, resolve=False))
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} must be given, as in {error.full_key}=VALUE") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"the settings cannot be composed: {' '.join(str(error).split())}") from None
    return plain, {name for name in PRESET_NAMES if f"${{{name}}}" not in written}


def split_config_folder(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The overrides, and the folder given by `--config-folder`. ValueError for any other option."""
    overrides: list[str] = []
    folder: Path | None = None
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name == "--config-folder":
            folder = Path(value or next(rest, ""))
        elif argument.startswith("-"):
            raise ValueError(f"unknown option '{argument}': give settings as NAME=VALUE; `--help` lists them")
        else:
            overrides.append(argument)
    return overrides, folder


def validated(plain: Any) -> Settings:
    """`Settings` from plain containers. ValueError names the first invalid setting, and the nearest name if unknown."""
    try:
        return Settings.model_validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = _without_tags([str(part) for part in first["loc"]])
        if first["type"] == "extra_forbidden":
            raise ValueError(_unknown(location)) from None
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], (dict, BaseModel)) else f" (got {first['input']!r})"
        raise ValueError(f"{'.'.join(location)}: {message}{got}" if location else message) from None


def _without_tags(location: list[str]) -> list[str]:
    """The dotted name of a setting, without the tag that pydantic adds for the member of a union."""
    path: list[str] = []
    for part in location:
        if len(sections_in(_plain_type(_find(path)))) < 2 or _find([*path, part]) is not None:
            path.append(part)
    return path


def _parse(overrides: list[str]) -> list[Override]:
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ValueError(f"'{text}' is not a setting: give settings as NAME=VALUE; `--help` lists them")
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ValueError(f"cannot parse an override: {' '.join(str(error).split())}") from None


def _checked(override: Override, folders: list[Path]) -> str:
    """The override for Hydra. `++` sets a value whether or not the YAML has it: the settings decide on the names."""
    key, text = override.key_or_group, str(override.input_line)
    choices = groups(folders)
    if key in choices and not isinstance(override.value(), dict):
        wanted = override.value()
        if not override.is_delete() and wanted not in choices[key]:
            raise ValueError(f"{key}={wanted}: unknown value.{_nearest(str(wanted), choices[key])}")
        return text
    if override.is_delete() or key.startswith("hydra."):
        return text
    if _find(_with_new_name(key).split(".")) is None:
        raise ValueError(_unknown(key.split(".")))
    return "++" + text.lstrip("+")


def _with_new_name(key: str) -> str:
    """The current name of a setting that is given by the name it had in older trainers."""
    for old, new in OLD_NAMES.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _find(path: list[str]) -> Any | None:
    """The type at a dotted path of the settings, or None. In a free-form dictionary any name is valid."""
    here: Any = Settings
    for part in path:
        here = _plain_type(here)
        if sections := sections_in(here):
            having = [section for section in sections if part in section.model_fields]
            if not having:
                return None
            here = having[0].model_fields[part].annotation
        elif typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
        elif here is not Any:
            return None
    return here


def _plain_type(annotation: Any) -> Any:
    """The annotation without Annotated and `| None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _plain_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return _plain_type(members[0]) if len(members) == 1 else annotation
    return annotation


def _unknown(path: list[str]) -> str:
    """The message for a path that does not exist, with the name nearest to its unknown part."""
    known: list[str] = []
    for length in range(1, len(path) + 1):
        if _find(path[:length]) is not None:
            continue
        parent = _plain_type(_find(path[: length - 1]) if length > 1 else Settings)
        prefix = ".".join([*path[: length - 1], ""])
        known = list(dict.fromkeys(prefix + name for section in sections_in(parent) for name in section.model_fields))
        break
    name = ".".join(path)
    return (
        f"there is no setting '{name}'.{_nearest(name, known, [setting for setting, _ in settings_by_name(Settings)])}"
    )


def _nearest(name: str, known: list[str], also: list[str] | None = None) -> str:
    """A suggestion of the closest name; if none is close, all known ones."""
    if close := difflib.get_close_matches(name, [*known, *(also or [])], n=1, cutoff=0.6):
        return f" Did you mean '{close[0]}'?"
    return f" Available: {', '.join(known)}." if known else " `--help` lists them."
