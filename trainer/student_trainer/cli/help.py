"""What `stillhouse-train --help` prints: commands, groups, settings. Called by `main`; imports no torch, no Hydra."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from student_trainer.settings import Settings

CONFIG = Path(__file__).parent.parent / "config"


def print_help(commands: str) -> None:
    """`commands`: what can be done, the text above groups and settings."""
    print(commands)
    print("Groups, chosen as in `distillation=logits_only`; --config-folder DIR adds choices of your own:")
    for folder in sorted(path for path in CONFIG.iterdir() if path.is_dir()):
        print(f"  {folder.name:14}{', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}")
    print("\nSettings, given as in `optim.learning_rate=1e-4`; NAME stands for a name of your choice:")
    for name, field in settings_by_name(Settings):
        shown = name if field.is_required() else f"{name}={_shown(field.get_default(call_default_factory=True))}"
        print(f"  {shown:52}{field.description or ''}".rstrip())


def settings_by_name(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted name, in the order of `settings`; members of a named family as `family.NAME`."""
    for name, field in model.model_fields.items():
        member = _model_in(field.annotation)
        if member is None:
            yield f"{prefix}{name}", field
        else:
            family = "" if member == field.annotation else "NAME."
            yield from settings_by_name(member, f"{prefix}{name}.{family}")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation is, or that the members of its dictionary are."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = getattr(annotation, "__args__", ())
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _shown(value: Any) -> str:
    """A default as one would write it on the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value).replace('"', "").replace(" ", "")
