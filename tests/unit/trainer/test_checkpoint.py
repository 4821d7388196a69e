"""Checkpoints: everything comes back bit for bit; any damage is seen; no crash leaves a mixture of old and new."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from student_trainer import randomness
from student_trainer.checkpoint import checkpoints as checkpoint
from student_trainer.checkpoint import files as checkpoint_files
from student_trainer.checkpoint.checkpoints import Checkpoints
from student_trainer.checkpoint.files import Snapshot
from student_trainer.data.mixture import Cursor, MixtureState, SourceState
from student_trainer.optim.optimizer import build_optimizer
from student_trainer.settings import CheckpointSettings, OptimSettings
from student_trainer.state import TrainState
from student_trainer.students.student import Student

MIXTURE = MixtureState(3, (SourceState("a", 0.1 + 0.2, "f", Cursor(1, 2, 3, 4), credit=1 / 3),), ((0, Cursor()),))


class Tied(nn.Module):
    """Embedding and head are one; a buffer is part of the state, another is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.rand(2))
        self.register_buffer("derived", torch.rand(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.linear(self.embedding(ids))))


def made(seed: int) -> tuple[Student, Any]:
    torch.manual_seed(seed)
    model = Tied()
    student = Student(model, None, None, model.head)  # type: ignore[arg-type]
    return student, build_optimizer(OptimSettings(), model, model.head, 100)


def learn(student: Student, optimizer: Any, first: int, steps: int) -> None:
    for number in range(first, first + steps):
        ids = torch.randint(0, 8, (6,))
        nn.functional.cross_entropy(student.model(ids), ids.flip(0)).backward()
        optimizer.step(number)
        optimizer.zero_grad()


def bits(student: Student, optimizer: Any) -> dict[str, bytes]:
    tensors = {**student.tensors(), **{f"o/{n}": t for n, t in optimizer.state().items()}}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def save(root: Path, step: int, student: Student, optimizer: Any, **settings: Any) -> Checkpoints:
    keeper = Checkpoints(root, CheckpointSettings(**settings), {"settings": {}, "teacher": None})
    keeper.save(TrainState(step, 7 * step, MIXTURE), student, optimizer)
    keeper.finish()
    return keeper


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    tensors, plain = randomness.capture()
    yield
    randomness.restore(tensors, plain)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    student, optimizer = made(0)
    learn(student, optimizer, 0, 5)
    save(tmp_path, 5, student, optimizer)
    learn(student, optimizer, 5, 5)
    straight, drawn = bits(student, optimizer), (random.random(), np.random.rand(), torch.rand(3).tolist())

    other, fresh = made(1)
    snapshot = checkpoint.newest(tmp_path)
    assert snapshot is not None
    place = checkpoint.restore(snapshot, other, fresh)
    assert place == TrainState(5, 35, MIXTURE)
    learn(other, fresh, 5, 5)
    assert bits(other, fresh) == straight
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == drawn


def test_a_tied_weight_is_saved_once_and_stays_tied(tmp_path: Path) -> None:
    student, optimizer = made(0)
    save(tmp_path, 1, student, optimizer)
    snapshot = checkpoint.newest(tmp_path)
    assert snapshot is not None
    assert set(snapshot.tensors["model"]) == {"embedding.weight", "linear.weight", "linear.bias", "kept"}
    other, fresh = made(1)
    checkpoint.restore(snapshot, other, fresh)
    assert other.model.head.weight is other.model.embedding.weight


def test_what_is_trained_after_a_save_does_not_reach_into_it(tmp_path: Path) -> None:
    student, optimizer = made(0)
    keeper = Checkpoints(tmp_path, CheckpointSettings(), {"settings": {}, "teacher": None})
    before = bits(student, optimizer)
    keeper.save(TrainState(1, 1, MIXTURE), student, optimizer)
    learn(student, optimizer, 0, 3)
    keeper.finish()
    other, fresh = made(1)
    snapshot = checkpoint.newest(tmp_path)
    assert snapshot is not None
    checkpoint.restore(snapshot, other, fresh)
    assert bits(other, fresh) == before


def test_only_the_newest_are_kept_and_latest_names_the_last(tmp_path: Path) -> None:
    student, optimizer = made(0)
    for step in range(1, 6):
        save(tmp_path, step, student, optimizer, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000004", "step-00000005"]
    assert (tmp_path / "latest").read_text() == "step-00000005"


FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "flipped": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    student, optimizer = made(0)
    save(tmp_path, 1, student, optimizer)
    before = bits(student, optimizer)
    learn(student, optimizer, 1, 1)
    save(tmp_path, 2, student, optimizer)
    DAMAGES[damage](tmp_path / "step-00000002" / name)
    if name == "manifest.json" and damage == "flipped":
        # A flip in the manifest may hit white space, which changes nothing, or a number, which does.
        text = (tmp_path / "step-00000002" / name).read_bytes()
        (tmp_path / "step-00000002" / name).write_bytes(text.replace(b'"sha256": "', b'"sha256": "0', 1))
    snapshot = checkpoint.newest(tmp_path)
    assert snapshot is not None and snapshot.step == 1
    assert "skipping a damaged checkpoint" in caplog.text and "step-00000002" in caplog.text
    other, fresh = made(1)
    checkpoint.restore(snapshot, other, fresh)
    assert bits(other, fresh) == before


def test_a_bit_that_flips_in_the_manifest_never_stops_the_run(tmp_path: Path) -> None:
    checkpoint_files.write(tmp_path, Snapshot(1, {"model": {"x": torch.ones(2)}}, {"step": 1}))
    manifest = (
        checkpoint_files.write(tmp_path, Snapshot(2, {"model": {"x": torch.ones(2)}}, {"step": 2})) / "manifest.json"
    )
    text = manifest.read_bytes()
    number = text.index(b'"version": ') + len(b'"version": ')
    for at in range(len(text)):
        if at != number:  # another number is another version, which is refused
            for bit in range(8):
                manifest.write_bytes(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :])
                snapshot = checkpoint.newest(tmp_path)
                assert snapshot is not None and snapshot.step in (1, 2)


@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_checkpoints_do_not_take_the_place_of_whole_ones(tmp_path: Path, damaged: int) -> None:
    student, optimizer = made(0)
    for step in (10, 20, 30):
        save(tmp_path, step, student, optimizer, keep=3)
    for step in (20, 30)[-damaged:]:
        _flip(tmp_path / f"step-{step:08d}" / "model.safetensors")
    before = checkpoint.newest(tmp_path)
    assert before is not None
    save(tmp_path, before.step + 5, student, optimizer, keep=damaged)
    kept = checkpoint.newest(tmp_path)
    assert kept is not None and kept.step == before.step + 5
    save(tmp_path, 35, student, optimizer, keep=damaged)
    save(tmp_path, 40, student, optimizer, keep=damaged)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000035", "step-00000040"][-damaged:]


def test_damage_everywhere_stops_instead_of_beginning_anew(tmp_path: Path) -> None:
    student, optimizer = made(0)
    save(tmp_path, 1, student, optimizer)
    (tmp_path / "step-00000001" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.newest(tmp_path)


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    student, optimizer = made(0)
    save(tmp_path, 1, student, optimizer)
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 3}))
    with pytest.raises(ValueError, match="version 3"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    student, optimizer = made(0)
    save(tmp_path, 1, student, optimizer)
    snapshot = checkpoint.newest(tmp_path)
    assert snapshot is not None
    student.model.linear = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="another student"):
        checkpoint.restore(snapshot, student, optimizer)


def test_a_damaged_checkpoint_does_not_stand_in_the_way_of_its_own_step(tmp_path: Path) -> None:
    student, optimizer = made(0)
    save(tmp_path, 1, student, optimizer)
    _flip(tmp_path / "step-00000001" / "model.safetensors")
    save(tmp_path, 1, student, optimizer)
    assert checkpoint.newest(tmp_path) is not None


class Crash(BaseException):
    """The machine stops: no handler of the code under test may act on it."""


def _crash_points(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[int]:
    """Let the `at`-th fsync, rename, write or save fail; counts them."""
    count = [0]

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                raise error
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    for name in ("rename", "replace", "write_text"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(checkpoint_files.safetensors.torch, "save_file",
                        counted(checkpoint_files.safetensors.torch.save_file))  # fmt: skip
    return count


@pytest.mark.parametrize("kind", ["crash", "no space"])
def test_wherever_a_save_is_cut_off_the_old_or_the_new_checkpoint_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    student, optimizer = made(0)
    old = tmp_path / "old"
    save(old, 1, student, optimizer)
    states = {1: bits(student, optimizer)}
    learn(student, optimizer, 1, 1)
    states[2] = bits(student, optimizer)
    error: BaseException = Crash() if kind == "crash" else OSError(28, "No space left on device")
    at, survived = 0, []
    while True:
        at += 1
        root = tmp_path / f"cut-{at}"
        shutil.copytree(old, root)
        with monkeypatch.context() as patched:
            count = _crash_points(patched, at, error)
            keeper = Checkpoints(root, CheckpointSettings(), {"settings": {}, "teacher": None})
            keeper.save(TrainState(2, 2, MIXTURE), student, optimizer)
            if kind == "crash" and keeper._pending is not None:
                assert keeper._pending.exception() is None or isinstance(keeper._pending.exception(), Crash)
            else:
                keeper.finish()
        snapshot = checkpoint.newest(root)
        assert snapshot is not None
        other, fresh = made(1)
        checkpoint.restore(snapshot, other, fresh)
        assert bits(other, fresh) == states[snapshot.step]
        survived.append(snapshot.step)
        if count[0] < at:
            break
        # What the cut save has left behind must not harm the next one.
        save(root, 2, student, optimizer)
        again = checkpoint.newest(root)
        assert again is not None and again.step == 2
    assert at > 12 and survived[0] == 1 and survived[-1] == 2
    assert survived == sorted(survived), "a later cut lost what an earlier one had kept"


def test_all_is_on_disk_before_the_name_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may keep a rename and lose what was written before it, unless that was synced."""
    done: list[tuple[str, str]] = []

    def note(what: str, path: Path) -> None:
        done.append((what, str(path.relative_to(tmp_path))))

    def fsync(descriptor: int, real: Any = os.fsync) -> None:
        note("sync", Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    def rename(old: Path, new: Path, real: Any = Path.rename) -> None:
        real(old, new)
        note("name", new)

    student, optimizer = made(0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        patched.setattr(Path, "rename", rename)
        patched.setattr(Path, "replace", rename)
        save(tmp_path, 1, student, optimizer)
    written = sorted(path.name for path in (tmp_path / "step-00000001").iterdir())
    files = [("sync", f".unfinished-step-00000001/{name}") for name in written if name != "manifest.json"]
    assert sorted(done[: len(files)]) == files and done[len(files) :] == [
        ("sync", ".unfinished-step-00000001/manifest.json"),
        ("sync", ".unfinished-step-00000001"),
        ("name", "step-00000001"),
        ("sync", "."),
        ("sync", ".latest.new"),
        ("name", "latest"),
        ("sync", "."),
    ]


def test_a_full_disk_is_told_loudly_and_the_next_save_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, optimizer = made(0)
    keeper = save(tmp_path, 1, student, optimizer)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        keeper.save(TrainState(2, 2, MIXTURE), student, optimizer)
        keeper.finish()
    assert "could not be saved" in caplog.text and "No space left" in caplog.text
    keeper.save(TrainState(2, 2, MIXTURE), student, optimizer)
    keeper.finish()
    snapshot = checkpoint.newest(tmp_path)
    assert snapshot is not None and snapshot.step == 2
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        keeper.save(TrainState(3, 3, MIXTURE), student, optimizer)
        keeper.finish(last=True)


def test_no_folder_half_written_is_taken_for_a_checkpoint(tmp_path: Path) -> None:
    snapshot = Snapshot(4, {"model": {"x": torch.ones(2)}}, {"step": 4})
    checkpoint_files.write(tmp_path, snapshot)
    (tmp_path / "step-00000004").rename(tmp_path / ".unfinished-step-00000005")
    assert checkpoint.newest(tmp_path) is None
