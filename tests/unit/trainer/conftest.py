"""A run that nothing disturbed, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer_run import Workshop


@pytest.fixture(scope="session")
def straight(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps that nothing disturbed."""
    from tests.trainer_run import ScriptedTargets, run_here

    root = tmp_path_factory.mktemp("straight")
    assert run_here(workshop.settings(root, "prefetch.depth=1", "evaluation.every=6"), ScriptedTargets()) == 0
    return root / "run"
