"""Keeps secrets out of what a run writes: settings.yaml, checkpoints, trackers, dumps, model cards, log lines.

`compose` passes a run's settings to `remember`. `public` gives the settings without secrets, `redact` any text, and
`RedactingFormatter` every line of the log. Secrets are: every string in `storage_options` except a few such as
endpoints and regions; user and password of a URL; a URL's parameters that sign it; and, wherever they appear, those
values again and the values of environment variables whose names end in KEY, TOKEN, SECRET, PASSWORD or PASSWD.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from student_trainer.settings import Settings

HIDDEN = "(hidden)"
# Strings of storage_options that are not secret: the store's address, and how to connect to it.
SHOWN = {
    "anon", "client_kwargs", "config_kwargs", "endpoint", "endpoint_url", "host", "port", "profile", "project",
    "protocol", "region", "region_name", "signature_version", "addressing_style", "target_protocol",
}  # fmt: skip
SHORTEST = 6  # Shorter values would match inside other words.
_SECRET_NAME = re.compile(r"secret|token|passw|credential|signature|^sig$|(^|[_-])key$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")
_WITH_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://)([^/\s:@]*:[^/\s@]*)@", re.IGNORECASE)
_WITH_USER = re.compile(r"((?:https?|wss?|s?ftp)://)([^/\s@]+)@", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&])([^=&\s?]+)=([^&\s\"'#]+)")
_OPTION = re.compile(r"(storage_options(?:\.[\w-]+)*=)([^\s,]+)")
_remembered: set[str] = set()


def remember(settings: Settings) -> None:
    """Remember the secrets in these settings, so that `redact` finds them wherever they appear."""
    for value in _secrets(settings.model_dump(mode="json"), in_options=False):
        _remembered.update(form for form in (value, unquote(value)) if len(form) >= SHORTEST)


def public(settings: Settings) -> dict[str, Any]:
    """The settings without secrets, for writing and showing."""
    return public_tree(settings.model_dump(mode="json"))


def public_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the plain settings of a checkpoint."""
    return {name: _shown(name, value, in_options=False) for name, value in tree.items()}


def redact(text: str) -> str:
    """The text without secrets."""
    for secret in sorted(_remembered | _of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _WITH_USER.sub(rf"\1{HIDDEN}@", _WITH_PASSWORD.sub(rf"\1{HIDDEN}@", text))
    return _OPTION.sub(rf"\1{HIDDEN}", _PARAMETER.sub(_parameter, text))


class RedactingFormatter(logging.Formatter):
    """A formatter that keeps secrets out of its lines, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _parameter(match: re.Match[str]) -> str:
    mark, name, _ = match.groups()
    return f"{mark}{name}={HIDDEN}" if _SECRET_NAME.search(name) else match.group()


def _of_environment() -> set[str]:
    """Secrets in environment variables. The path of a file is not one: it only names the file that holds it."""
    return {
        value.strip()
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and len(value.strip()) >= SHORTEST and not _is_path(value.strip())
    }


def _is_path(value: str) -> bool:
    # A base64 key may begin with a slash as well.
    if not value.startswith(("/", "~", ".")):
        return False
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False  # longer than a name may be, or the home of nobody


def _is_hidden(name: str, value: Any) -> bool:
    """Whether an option's value is a secret. A number is one only if its name says so, a boolean never."""
    if value is None or isinstance(value, bool) or value == "":
        return False
    return bool(_SECRET_NAME.search(name)) or (isinstance(value, str) and name not in SHOWN)


def _shown(name: str, value: Any, in_options: bool) -> Any:
    in_options = in_options or name == "storage_options"
    if isinstance(value, Mapping):
        return {str(key): _shown(str(key), inner, in_options) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(name, inner, in_options) for inner in value]
    if in_options and _is_hidden(name, value):
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def _secrets(value: Any, in_options: bool, name: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secrets(inner, in_options or key == "storage_options", str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secrets(inner, in_options, name)
    elif in_options and _is_hidden(name, value):
        yield str(value)
    elif isinstance(value, str):
        for pattern in (_WITH_PASSWORD, _WITH_USER):
            for found in pattern.finditer(value):
                yield found.group(2).rpartition(":")[2]
        yield from (found.group(3) for found in _PARAMETER.finditer(value) if _SECRET_NAME.search(found.group(2)))
