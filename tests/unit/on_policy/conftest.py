"""A tiny student and text for it, and the settings of a run whose student writes every second batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer_run import Workshop

OWN = ("on_policy=reverse_kl", "on_policy.prompt_tokens=6", "on_policy.new_tokens=10")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def straight(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps that nothing disturbed."""
    from tests.trainer_run import ScriptedTargets, run_here

    root = tmp_path_factory.mktemp("straight")
    assert run_here(workshop.settings(root, *OWN, "prefetch.depth=1"), ScriptedTargets()) == 0
    return root / "run"
