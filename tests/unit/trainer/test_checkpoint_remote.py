"""Checkpoints on stores that are real servers (moto's S3, the GCS emulator) and in memory, by the same code."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from student_trainer import loop
from student_trainer.checkpoint import files as checkpoint_files
from student_trainer.checkpoint.files import Snapshot
from student_trainer.checkpoint.remote import RemoteCheckpoints
from student_trainer.settings import CheckpointSettings
from teacher_proto.identity import flatten
from teacher_proto.process.stopping import StopSignals
from tests.teacher_process import free_port
from tests.trainer_run import ScriptedTargets, Workshop, final_files, run_here, steps_of, trace_of
from tests.unit.data.stores import BUCKET, STORES


@pytest.fixture(params=["memory", *STORES])
def store(request: Any, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Settings of checkpoints on a store of its own."""
    opened = nullcontext({}) if request.param == "memory" else STORES[request.param]()
    with opened as options:
        yield {"url": f"{request.param}://{BUCKET}/{tmp_path.name}", "storage_options": options}


def sealed(root: Path, step: int) -> Path:
    tensors = {"model": {"x": torch.full((500,), float(step))}}
    return checkpoint_files.write(root, Snapshot(step, tensors, {"step": step}))


def uploaded(store: dict[str, Any], root: Path, *steps: int, **settings: Any) -> RemoteCheckpoints:
    remote = RemoteCheckpoints(CheckpointSettings(**store, **settings), "run")
    for step in steps:
        single = RemoteCheckpoints(CheckpointSettings(**store, **settings), "run")
        single.upload(sealed(root, step))
        single.close()
    return remote


def flip(store: dict[str, Any], name: str) -> None:
    with fsspec.open(f"{store['url']}/run/{name}", "rb", **store["storage_options"]) as file:
        data = bytearray(file.read())
    data[-1] ^= 1
    with fsspec.open(f"{store['url']}/run/{name}", "wb", **store["storage_options"]) as file:
        file.write(bytes(data))


def test_what_is_uploaded_comes_back_whole_and_the_newest_are_kept(store: dict[str, Any], tmp_path: Path) -> None:
    remote = uploaded(store, tmp_path, 1, 2, 10, keep=2)
    assert remote.steps() == [10, 2]
    remote.pull(tmp_path / "other", beyond=2, name="0")
    snapshot = checkpoint_files.read(tmp_path / "other" / "step-00000010")
    assert snapshot.step == 10 and bool((snapshot.tensors["model"]["x"] == 10.0).all())
    remote.pull(tmp_path / "nothing", beyond=10, name="0")
    assert not (tmp_path / "nothing").exists()
    assert RemoteCheckpoints(CheckpointSettings(**store), "another-run").steps() == []


def test_a_damaged_one_is_passed_over_and_one_cut_short_is_none(
    store: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = uploaded(store, tmp_path, 1, 2, 3, keep=3)
    store_fs, root = fsspec.core.url_to_fs(f"{store['url']}/run", **store["storage_options"])
    store_fs.rm_file(f"{root}/step-00000003/manifest.json")
    flip(store, "step-00000002/model.safetensors")
    remote.pull(tmp_path / "other", beyond=-1, name="0")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["step-00000001"]
    assert "sha256 differs" in caplog.text and "step-00000002" in caplog.text


def test_damaged_copies_do_not_take_the_place_of_whole_ones(store: dict[str, Any], tmp_path: Path) -> None:
    remote = uploaded(store, tmp_path, 1, 3, keep=2)
    flip(store, "step-00000003/model.safetensors")
    uploaded(store, tmp_path, 2, keep=1)
    remote.pull(tmp_path / "other", beyond=1, name="0")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["step-00000002"]


def overrides(store: dict[str, Any]) -> list[str]:
    options = flatten(store["storage_options"]).items()
    return [
        f"checkpoint.url={store['url']}",
        *(f"checkpoint.storage_options.{name}={json.dumps(value)}" for name, value in options),
    ]


def test_a_run_that_lost_its_folder_goes_on_from_the_store_bit_for_bit(
    store: dict[str, Any], workshop: Workshop, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAtSeven(StopSignals):
        def check(self) -> None:
            if steps_of(tmp_path / "run")[-1:] == [7]:
                raise self.Stop("a test stopped the run")

    arguments = workshop.settings(tmp_path, *overrides(store))
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", StopAtSeven)
        assert run_here(arguments, ScriptedTargets()) == loop.STOPPED
    shutil.rmtree(tmp_path / "run")
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "run") == trace_of(straight)[7:]
    assert final_files(tmp_path / "run", 12) == final_files(straight, 12)
    assert RemoteCheckpoints(CheckpointSettings(**store), "run").steps() == [12, 8]
    with pytest.raises(ValueError, match=r"run.resume is never"):
        run_here([*workshop.settings(tmp_path / "elsewhere", *overrides(store)), "run.resume=never"], ScriptedTargets())


@pytest.fixture
def closed_door(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    options = {"endpoint_url": f"http://127.0.0.1:{free_port()}", "config_kwargs": {"retries": {"max_attempts": 0}}}
    return {"url": f"s3://{BUCKET}/x", "storage_options": options}


def test_a_store_that_is_down_costs_the_copy_and_no_step(
    closed_door: dict[str, Any], workshop: Workshop, straight: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The run has a checkpoint on its own disk when the store goes down: it goes on from that one."""
    assert run_here(workshop.settings(tmp_path, "checkpoint.every=4"), ScriptedTargets()) == loop.DONE
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    with caplog.at_level(logging.ERROR):
        assert run_here(workshop.settings(tmp_path, *overrides(closed_door)), ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "run") == trace_of(straight)
    assert final_files(tmp_path / "run", 12) == final_files(straight, 12)
    assert (
        "can't look for a later checkpoint in" in caplog.text and "uploading checkpoint step-00000012 to" in caplog.text
    )


def test_without_any_checkpoint_a_store_that_is_down_stops_the_start(
    closed_door: dict[str, Any], workshop: Workshop, tmp_path: Path
) -> None:
    """Beginning anew would in time remove from the store what the run has there."""
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        run_here(workshop.settings(tmp_path, *overrides(closed_door)), ScriptedTargets())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
