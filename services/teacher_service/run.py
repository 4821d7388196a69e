"""Builds engine, service and application out of settings, and runs them. Called by `main.py` once options are read."""

from __future__ import annotations

import socket
from collections.abc import Callable

from pydantic import ValidationError

from serving.http_server import bind
from serving.keys import Keys
from serving.logs import set_up_logs
from serving.process import Process
from teacher_service.app import create_app
from teacher_service.engine import Engine
from teacher_service.service import TeacherService
from teacher_service.settings import EngineName, TeacherSettings


def run(settings: TeacherSettings) -> int:
    """Serve until a signal; the exit code. ValueError for what can't be served."""
    import uvloop

    set_up_logs(settings.log_format, settings.log_level)
    keys = Keys.load(settings.keys) if settings.keys is not None else Keys()
    listener = bind(settings.host, settings.port)
    with listener:
        return uvloop.run(_serve(settings, keys, listener))


async def _serve(settings: TeacherSettings, keys: Keys, listener: socket.socket) -> int:
    service = TeacherService(ENGINES[settings.engine](settings), settings, keys)
    process = Process(service, settings.drain_time)
    service.on_death = process.died

    def announce() -> None:
        identity = service.engine.identity
        url = f"http://{settings.host}:{listener.getsockname()[1]}"
        print(f"stillhouse-teacher: ready at {url}, {identity.semantic.model}, {identity.fingerprint}", flush=True)

    return await process.run(create_app(service), listener, None, announce)


def _scripted(settings: TeacherSettings) -> Engine:
    from teacher_service.scripted_engine import Script, ScriptedEngine

    try:
        return ScriptedEngine(Script.model_validate_json(settings.script), settings.model)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"--script: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


ENGINES: dict[EngineName, Callable[[TeacherSettings], Engine]] = {"scripted": _scripted}
