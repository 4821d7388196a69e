"""Trackers that are slow, full, down or broken: the run takes no notice, and metrics.jsonl has every line."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from student_trainer.reporting import logs, trackers
from student_trainer.reporting.trackers import Tracker
from tests.trainer_run import ScriptedTargets, Workshop, lines_of, run_here, steps_of, trace_of, train

STEPS = list(range(1, 13))


class Hanging:
    """Takes nothing, ever."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        threading.Event().wait()

    def close(self) -> None: ...


class Slow:
    """Takes a line in half a second: far slower than the run makes them."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        time.sleep(0.5)

    def close(self) -> None: ...


class Breaking:
    """Fails at the third line."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        if step >= 3:
            raise ConnectionResetError("the tracker's server has gone")

    def close(self) -> None: ...


def down() -> Any:
    raise ConnectionRefusedError("nobody is there")


@pytest.fixture(scope="module")
def alone(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    assert run_here(workshop.settings(root), ScriptedTargets()) == 0
    return root / "run"


@pytest.mark.parametrize(
    ("sink", "said"),
    [(Hanging, "too slowly"), (Slow, "too slowly"), (Breaking, "gets no more metrics"), (down, "gets no more metrics")],
)
def test_a_bad_tracker_costs_the_run_nothing_and_no_line_is_lost(
    workshop: Workshop, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    sink: Any, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(trackers, "QUEUE_LINES", 4)
    monkeypatch.setattr(trackers, "CLOSE_WITHIN_S", 0.2)
    monkeypatch.setattr(logs, "open_trackers", lambda *_: [Tracker("bad", sink)])
    with caplog.at_level(logging.WARNING):
        assert run_here(workshop.settings(tmp_path), ScriptedTargets()) == 0
    assert said in caplog.text and "metrics.jsonl" in caplog.text
    assert steps_of(tmp_path / "run") == STEPS
    assert trace_of(tmp_path / "run") == trace_of(alone)


def test_a_line_for_a_full_queue_is_dropped_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "QUEUE_LINES", 4)
    monkeypatch.setattr(trackers, "CLOSE_WITHIN_S", 0.1)
    tracker = Tracker("bad", Hanging)
    began = time.monotonic()
    for step in range(10_000):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - began < 5.0
    # One is in the sink's hands, four are queued.
    assert tracker.dropped >= 10_000 - 6
    tracker.close()


def offline() -> None:
    os.environ["WANDB_MODE"] = "offline"


def nobody_answers() -> None:
    os.environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


def test_wandb_offline_has_what_metrics_jsonl_has(workshop: Workshop, tmp_path: Path, teacher: Any) -> None:
    given = workshop.settings(tmp_path, "logging.wandb=offline", url=teacher.url)
    assert train(given, tmp_path / "output.txt", prelude=offline) == 0, (tmp_path / "output.txt").read_text()
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-run.wandb")
    assert kept.stat().st_size > 1000
    assert steps_of(tmp_path / "run") == STEPS


@pytest.mark.slow
def test_wandb_with_nobody_at_its_address_changes_nothing(
    workshop: Workshop, alone: Path, tmp_path: Path, teacher: Any
) -> None:
    given = workshop.settings(tmp_path, "logging.wandb=auto", url=teacher.url)
    assert train(given, tmp_path / "output.txt", prelude=nobody_answers, timeout_s=240) == 0
    text = (tmp_path / "output.txt").read_text()
    assert "wandb" in text and "metrics.jsonl has" in text
    assert trace_of(tmp_path / "run") == trace_of(alone)
    assert all(line["seconds"] > 0 for line in lines_of(tmp_path / "run"))
