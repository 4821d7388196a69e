"""A student's checkpoint on an object store: fetched once, gone on with where it was cut, held against checksums."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from student_trainer.checkpoint import fetched
from student_trainer.checkpoint.earlier_run import load_student, model_behind
from student_trainer.cli.compose import compose
from student_trainer.cli.defaults import original_of
from student_trainer.settings import StudentSettings
from tests.models import save_tiny_llama
from tests.trainer_run import ScriptedTargets, Workshop, lines_of, run_here
from tests.unit.data.stores import BUCKET, STORES

CPU = torch.device("cpu")


class Store:
    """A store of a test's own, and settings of a student that lies there."""

    def __init__(self, url: str, options: dict[str, Any], cache: Path):
        self.url, self.options, self.cache = url, options, cache
        self.fs, self.root = fsspec.core.url_to_fs(url, **options)

    def put(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(str(path.relative_to(folder)), path.read_bytes())

    def write(self, name: str, data: bytes) -> None:
        self.fs.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(f"{self.root}/{name}", data)

    def settings(self, **more: Any) -> StudentSettings:
        return StudentSettings(
            checkpoint_path=f"{self.url}/", cache_folder=str(self.cache), storage_options=self.options, **more
        )

    def fetch(self) -> Path:
        """As a process that begins would."""
        fetched._fetched.clear()
        return Path(fetched.on_this_disk(self.settings()).checkpoint_path)


@pytest.fixture(params=["memory", *STORES])
def store(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(fetched, "_fetched", {})
    with nullcontext({}) if request.param == "memory" else STORES[request.param]() as options:
        yield Store(f"{request.param}://{BUCKET}/{tmp_path.name}/checkpoint", options, tmp_path / "cache")


class Ranges:
    """The ranges that are read; after `last` of them the line is cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int = 10**9, damage: int = 0):
        self.read: list[tuple[str, int]] = []
        self.last, self.damage = last, damage
        self._real = fetched._range
        monkeypatch.setattr(fetched, "_range", self)

    def __call__(self, url: str, store: Any, file: Any, start: int) -> bytes:
        if len(self.read) >= self.last:
            raise OSError("the line is cut")
        self.read.append((file.place, start))
        data = self._real(url, store, file, start)
        if file.place == "model.safetensors" and self.damage:
            self.damage -= 1
            return bytes([data[0] ^ 1]) + data[1:]
        return data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=1)
    (folder / "optimizer.pt").write_bytes(b"never fetched")
    return folder


def test_a_model_is_fetched_once_and_what_changes_again(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(model)
    folder = store.fetch()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    assert not (folder / "optimizer.pt").exists() and not list(folder.rglob("*.part"))
    student = load_student(store.settings(), CPU)
    reference = load_student(StudentSettings(checkpoint_path=str(model)), CPU)
    for ours, theirs in zip(student.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ranges = Ranges(monkeypatch)
    store.fetch()
    assert ranges.read == []
    store.write("generation_config.json", b"{}  ")
    store.fs.rm_file(f"{store.root}/tokenizer_config.json")
    store.fetch()
    assert ranges.read == [("generation_config.json", 0)]
    assert (folder / "generation_config.json").read_bytes() == b"{}  "
    assert not (folder / "tokenizer_config.json").exists()


def test_a_file_cut_short_goes_on_where_it_was(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetched, "RANGE", 50_000)
    store.put(model)
    cut = Ranges(monkeypatch, last=4)
    with pytest.raises(OSError, match="the line is cut"):
        store.fetch()
    begun = cut.read[-1]
    assert begun[0] == "model.safetensors" and begun[1] > 0, "the cut is in the midst of the weights"
    monkeypatch.undo()
    monkeypatch.setattr(fetched, "RANGE", 50_000)
    rest = Ranges(monkeypatch)
    with caplog.at_level(logging.INFO):
        folder = store.fetch()
    assert rest.read[0] == ("model.safetensors", begun[1] + 50_000), "no byte is fetched twice"
    assert not {name for name, _ in cut.read[:-1]} & {name for name, _ in rest.read} - {"model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert f"resuming model.safetensors of {store.url} at byte {begun[1] + 50_000:,}" in caplog.text


def test_a_file_that_became_another_one_begins_anew(store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetched, "RANGE", 50_000)
    store.put(model)
    Ranges(monkeypatch, last=4)
    with pytest.raises(OSError, match="the line is cut"):
        store.fetch()
    other = bytes(reversed((model / "model.safetensors").read_bytes()))
    store.write("model.safetensors", other)
    monkeypatch.undo()
    assert (store.fetch() / "model.safetensors").read_bytes() == other


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_what_came_damaged_is_fetched_again_and_not_forever(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(model)
    Ranges(monkeypatch, damage=1)
    folder = store.fetch()
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert "model.safetensors" in caplog.text and "arrived damaged" in caplog.text
    shutil.rmtree(store.cache)
    monkeypatch.undo()
    Ranges(monkeypatch, damage=2)
    with pytest.raises(ValueError, match="doesn't match the store's MD5 or size"):
        store.fetch()
    assert not (folder / "model.safetensors").exists()


def test_without_the_store_the_copy_is_used_and_without_both_nothing(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any) -> Any:
        raise ConnectionError("nobody there")

    real = fetched._listed
    monkeypatch.setattr(fetched, "_listed", away)
    with pytest.raises(OSError, match="nobody there"):
        store.fetch()
    monkeypatch.setattr(fetched, "_listed", real)
    with pytest.raises(ValueError, match=r"holds neither a model's config\.json nor a run's checkpoint"):
        store.fetch()
    store.put(model)
    store.fetch()
    monkeypatch.setattr(fetched, "_listed", away)
    assert (store.fetch() / "config.json").exists()
    assert "using the copy in" in caplog.text and "as it is" in caplog.text


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    assert run_here(workshop.settings(root, "run.steps=2", "checkpoint.every=1"), ScriptedTargets()) == 0
    return root / "run"


@pytest.mark.parametrize("whole", [True, False], ids=["its folder", "a copy by checkpoint.url"])
def test_a_run_goes_on_from_a_run_there(
    store: Store, workshop: Workshop, trained: Path, tmp_path: Path, whole: bool
) -> None:
    store.put(trained if whole else trained / "checkpoints")
    settings = store.settings()
    assert original_of(settings.model_dump()) == (str(workshop.student), "the run that it comes from")
    assert model_behind(settings).checkpoint_path == str(workshop.student)
    folder = Path(fetched.on_this_disk(settings).checkpoint_path)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"], "the newest alone"
    assert yaml.safe_load((folder / "settings.yaml").read_text())["student"]["checkpoint_path"] == str(workshop.student)
    ours, theirs = (load_student(each, CPU) for each in (settings, StudentSettings(checkpoint_path=str(trained))))
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_runs_checkpoint_that_is_not_as_written_is_refused(store: Store, trained: Path) -> None:
    store.put(trained)
    data = bytearray((trained / "checkpoints/step-00000002/model.safetensors").read_bytes())
    data[-1] ^= 1
    store.write("checkpoints/step-00000002/model.safetensors", bytes(data))
    for _ in range(2):
        with pytest.raises(ValueError, match="its sha256 differs"):
            store.fetch()


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_the_old_command_line_with_a_bucket(
    store: Store, workshop: Workshop, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`student.checkpoint_path=gs://bucket/checkpoint/`, and what makes the run small and finds the emulator."""
    teacher = save_tiny_llama(tmp_path / "original", seed=7)
    store.put(model)
    store.write("README.md", f"---\nbase_model: {teacher}\n---\n".encode())
    line = [f"student.checkpoint_path={store.url}/", f"student.cache_folder={store.cache}"]
    line += [f"student.storage_options.{name}='{value}'" for name, value in store.options.items()]
    small = [each for each in workshop.settings(tmp_path, "run.steps=2") if "checkpoint_path" not in each]
    with caplog.at_level(logging.INFO):
        assert run_here([*line, *small, "teacher.sanity=off"]) == 0
    assert [each["step"] for each in lines_of(tmp_path / "run")] == [1, 2]
    assert f"teacher: {teacher}, the student's original model according to base_model of its model card" in caplog.text
    assert f"files of {store.url} into {store.cache}" in caplog.text
    settings = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert settings["student"]["checkpoint_path"] == f"{store.url}/"


def test_settings_of_a_url_without_one_warn() -> None:
    with pytest.warns(UserWarning, match=r"student\.cache_folder has no effect: student\.checkpoint_path is not a URL"):
        compose(["student.checkpoint_path=/m", "data.rows=1", "student.cache_folder=/x"])
