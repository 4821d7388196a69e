"""What `stillhouse-train --help` prints: commands, groups, settings. Called by `main`; imports no torch, no Hydra."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from student_trainer.settings import Settings

CONFIG = Path(__file__).parent.parent / "config"
WIDTH_BESIDE = 50  # columns that a description needs to go next to its name


def print_help(commands: str) -> None:
    """Print `commands`, the text about the commands, then groups and settings."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(commands)
    print("Groups, chosen as in `distillation=logits_only`; --config-folder DIR adds choices of your own:")
    for name, choices in groups([CONFIG]).items():
        print(entry(f"  {name:14}", ", ".join(choices), width))
    print("\nSettings, given as in `optim.learning_rate=1e-4`; NAME stands for a name of your choice:")
    for name, field in settings_by_name(Settings):
        shown = name if field.is_required() else f"{name}={_shown(field.get_default(call_default_factory=True))}"
        print(entry(f"  {shown:52}", field.description or "", width))


def entry(name: str, about: str, width: int | None) -> str:
    """One line, as readers of a pipe expect. In a terminal of `width` columns it is wrapped, below the name if there is
    little room next to it.
    """
    if width is None or len(name + about) <= width:
        return (name + about).rstrip()
    if width - len(name) >= WIDTH_BESIDE:
        return textwrap.fill(about, width, initial_indent=name, subsequent_indent=" " * len(name))
    return f"{name.rstrip()}\n" + textwrap.fill(about, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def groups(folders: list[Path]) -> dict[str, list[str]]:
    """The choices of each group: the YAML files in its folder."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {name: sorted(choices) for name, choices in sorted(found.items())}


def settings_by_name(*sections: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted name, in the order of `settings`; members of a dictionary as `terms.NAME`. Several
    sections are the kinds of one union; each of their names comes once.
    """
    fields = {name: field for section in reversed(sections) for name, field in section.model_fields.items()}
    for name in dict.fromkeys(name for section in sections for name in section.model_fields):
        annotation = fields[name].annotation
        own = sections_in(annotation)
        members = own or [m for each in typing.get_args(annotation) for m in sections_in(each)]
        if not members:
            yield f"{prefix}{name}", fields[name]
        else:
            family = "" if own else "NAME."
            yield from settings_by_name(*members, prefix=f"{prefix}{name}.{family}")


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section that an annotation names, or all members of a union of sections."""
    if typing.get_origin(annotation) is typing.Annotated:
        return sections_in(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [section for member in typing.get_args(annotation) for section in sections_in(member)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _shown(value: Any) -> str:
    """A default as one would write it on the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value).replace('"', "").replace(" ", "")
