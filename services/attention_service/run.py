"""Builds engine, service and application out of settings, and runs them. Called by `main.py` once options are read."""

from __future__ import annotations

from attention_service.app import create_app
from attention_service.engine import AttentionEngine
from attention_service.service import AttentionService
from attention_service.settings import AttentionSettings
from serving.http.keys import Keys
from serving.run import run_service


def run(settings: AttentionSettings) -> int:
    """Serve until a signal; the exit code. ValueError for what can't be served."""

    def make_service(keys: Keys) -> AttentionService:
        return AttentionService(AttentionEngine(settings), settings, keys)

    return run_service(settings, make_service, create_app)
