"""Builds engine, service and application from settings, and runs them. Called by `main.py` once options are parsed."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from serving.http.keys import Keys
from serving.process import run_service
from teacher_service.app import create_app
from teacher_service.engines.protocol import Engine
from teacher_service.service import TeacherService
from teacher_service.settings import EngineName, TeacherSettings

if TYPE_CHECKING:
    from teacher_service.stored import StoredTargets


def run(settings: TeacherSettings) -> int:
    """Serve until a signal; returns the exit code. ValueError for what can't be served."""

    def make_service(keys: Keys) -> TeacherService:
        return TeacherService(ENGINES[settings.engine](settings), settings, keys, _store(settings))

    return run_service(settings, make_service, create_app)


def _store(settings: TeacherSettings) -> StoredTargets | None:
    if settings.store is None:
        return None
    from teacher_service.stored import StoredTargets

    return StoredTargets(settings.store, settings.store_bytes)


def _scripted(settings: TeacherSettings) -> Engine:
    from teacher_service.engines.scripted import Script, ScriptedEngine

    try:
        return ScriptedEngine(Script.model_validate_json(settings.script), settings.model)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"--script: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _hf(settings: TeacherSettings) -> Engine:
    from teacher_service.engines.hf import HfEngine

    extra = engine_options(settings.engine_args)
    if unknown := extra.keys() - inspect.signature(HfEngine.__init__).parameters.keys():
        raise ValueError(f"unknown options for --engine hf: {', '.join(sorted(unknown))}")
    return HfEngine(
        settings.model, revision=settings.revision, name=settings.name, dtype=settings.dtype,
        max_model_len=settings.max_model_len, max_top_k=settings.max_top_k, **extra,
    )  # fmt: skip


def _vllm(settings: TeacherSettings) -> Engine:
    from teacher_service.engines.vllm_engine import VllmEngine

    extra = engine_options(settings.engine_args)
    own = inspect.signature(VllmEngine.__init__).parameters.keys() & extra.keys()
    return VllmEngine(
        settings.model, revision=settings.revision, name=settings.name, dtype=settings.dtype,
        max_model_len=settings.max_model_len, max_top_k=settings.max_top_k,
        vllm_args={name: value for name, value in extra.items() if name not in own},
        **{name: extra[name] for name in own},
    )  # fmt: skip


ENGINES: dict[EngineName, Callable[[TeacherSettings], Engine]] = {"vllm": _vllm, "hf": _hf, "scripted": _scripted}


def engine_options(text: str) -> dict[str, Any]:
    """`--tensor-parallel-size 2 --enforce-eager` as `{"tensor_parallel_size": 2, "enforce_eager": True}`.

    Values that are JSON are parsed as JSON; `--no-x` is `x: False`. ValueError for anything else.
    """
    words = shlex.split(text)
    options: dict[str, Any] = {}
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise ValueError(f"{name!r} is neither an option of stillhouse-teacher nor one for vLLM")
        key = name[2:].replace("-", "_")
        if not equals and words and not words[0].startswith("--"):
            value, equals = words.pop(0), "="
        if equals:
            options[key] = _as_json(value)
        else:
            options[key.removeprefix("no_")] = not key.startswith("no_")
    return options


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
