"""`stillhouse-teacher fill --output` and `dataset` as commands: whole shards, once each, from any number of fillers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.dataset.check import dataset_stats
from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.dataset.folder import Folder
from teacher_proto.requests import TargetsRequest
from tests.contract.test_fill_and_pack import ASK, SCRIPTED, command, write_data
from tests.teacher_process import TeacherProcess
from tests.unit.data.stores import BUCKET, STORES
from tests.unit.proto.fake_teacher import same_bits

SMALL = ("--shard-tokens", "400")


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a dataset; a file that a killed writer had begun has a name of its own, which nobody reads."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def fill(data: Path, output: object, *more: object) -> subprocess.CompletedProcess[str]:
    return command("fill", "scripted", data, *SCRIPTED, "--output", output, *ASK, *SMALL, *more)


def test_a_filled_dataset_is_what_is_answered_online(tmp_path: Path) -> None:
    rows = write_data(tmp_path / "data.jsonl", 25)
    write_data(tmp_path / "data.jsonl", 25)
    done = fill(tmp_path / "data.jsonl", tmp_path / "out")
    assert done.returncode == 0 and "25 sequences scored (1000 tokens" in done.stdout, done.stderr
    with TeacherProcess() as online, SyncTeacherClient(online.url) as client:
        request = TargetsRequest(sequences=tuple(rows), top_k=16, temperatures=(2.0, 5.0))
        computed = client.targets(request)
    with TargetDataset(str(tmp_path / "out"), readonly=True) as dataset:
        assert len(dataset.index.shards) == 3
        for number, answer in enumerate(computed):
            stored = dataset.get(dataset.manifest.teacher.fingerprint, request.query(number))
            assert stored is not None and same_bits(stored, answer)
    again = fill(tmp_path / "data.jsonl", tmp_path / "out")
    assert "0 sequences scored" in again.stdout and "25 already stored" in again.stdout
    said = command("dataset", "stats", tmp_path / "out").stdout
    assert "documents:     25\n" in said and "tokens:        1,000\n" in said and "lossless" in said
    left = tmp_path / "out" / "index" / f".targets-1.idx.{'0' * 32}"
    left.touch()
    os.utime(left, (0, 0))
    checked = command("dataset", "check", tmp_path / "out")
    assert checked.returncode == 0 and "all shards are intact" in checked.stdout
    assert f"{left.name} is being written, or was left by a fill that was killed" in checked.stdout and left.exists()
    cleaned = command("dataset", "check", tmp_path / "out", "--clean")
    assert cleaned.returncode == 0 and f"removed {tmp_path / 'out'}/index/{left.name}" in cleaned.stdout
    assert not left.exists()
    merged = command("dataset", "merge", tmp_path / "out")
    assert merged.returncode == 0 and "one index of 3 shards" in merged.stdout


def test_processes_that_share_the_data_write_what_one_would(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl", 45)
    fill(tmp_path / "data.jsonl", tmp_path / "one")
    words = [sys.executable, "-m", "teacher_service.main", "fill", "scripted", str(tmp_path / "data.jsonl"), *SCRIPTED,
             "--output", str(tmp_path / "two"), *ASK, *SMALL]  # fmt: skip
    processes = [subprocess.Popen([*words, "--slice", f"{n}/2"], stdout=subprocess.DEVNULL) for n in (1, 2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_killed_fill_loses_the_shards_under_way_alone(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl", 120)
    words = [sys.executable, "-m", "teacher_service.main", "fill", "scripted", str(tmp_path / "data.jsonl"), *SCRIPTED,
             "--output", str(tmp_path / "out"), *ASK, *SMALL]  # fmt: skip
    slow = ["--window", "100", "--script", '{"delay_s": 0.02}']
    process = subprocess.Popen([*words, *slow])
    deadline = time.monotonic() + 40
    while len(list((tmp_path / "out" / "index").glob("*.idx"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = fill(tmp_path / "data.jsonl", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    scored = int(done.stdout.split(" sequences scored")[0].rpartition(" ")[2])
    assert 0 < scored <= 100 and f"{120 - scored} already stored" in done.stdout
    fill(tmp_path / "data.jsonl", tmp_path / "other")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "other")


def test_a_fill_that_is_stopped_keeps_what_was_scored(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl", 120)
    words = [sys.executable, "-m", "teacher_service.main", "fill", "scripted", str(tmp_path / "data.jsonl"), *SCRIPTED,
             "--output", str(tmp_path / "out"), *ASK]  # fmt: skip
    process = subprocess.Popen([*words, "--window", "100", "--script", '{"delay_s": 0.05}'], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 40
    while not (tmp_path / "out").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    kept = dataset_stats(Folder(str(tmp_path / "out"))).documents
    done = command(*words[3:])
    assert kept > 0 and f"{120 - kept} sequences scored" in done.stdout and f"{kept} already stored" in done.stdout


@pytest.mark.parametrize("store", STORES)
def test_a_bucket_is_filled_as_a_folder_is(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data.jsonl", 25)
    fill(tmp_path / "data.jsonl", tmp_path / "one")
    with STORES[store]() as options:
        for name, value in options.items():
            monkeypatch.setenv(f"FSSPEC_{store.upper()}_{name.upper()}", value)
        url = f"{store}://{BUCKET}/{tmp_path.name}"
        done = fill(tmp_path / "data.jsonl", url)
        assert done.returncode == 0, done.stderr
        checked = command("dataset", "check", url)
        assert checked.returncode == 0, checked.stderr
        copied = Folder(url, options)
        for below in ("shards", "index"):
            names = copied.list(below)
            assert names and sorted(names) == sorted(path.name for path in (tmp_path / "one" / below).iterdir())
            for name in names:
                assert copied.read(f"{below}/{name}") == (tmp_path / "one" / below / name).read_bytes()


def test_documents_that_fail_and_an_engine_that_dies_are_told(tmp_path: Path) -> None:
    rows = [[n, n + 1] for n in range(1, 40, 3)]
    (tmp_path / "data.jsonl").write_text("".join(f'{{"tokens": {row}}}\n' for row in rows))
    died = fill(tmp_path / "data.jsonl", tmp_path / "out", "--script", '{"die_token": 22}', "--window", "4")
    assert died.returncode == 70 and "What was scored is kept" in died.stderr and "Traceback" not in died.stderr
    kept = dataset_stats(Folder(str(tmp_path / "out"))).documents
    assert 0 < kept < len(rows)
    failed = fill(tmp_path / "data.jsonl", tmp_path / "out", "--script", '{"poison_token": 22}')
    assert failed.returncode == 1 and "1 failed" in failed.stdout and f"{kept} already stored" in failed.stdout
    done = fill(tmp_path / "data.jsonl", tmp_path / "out")
    assert done.returncode == 0 and "1 sequences scored" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fill", "scripted", "DATA", *SCRIPTED], "expected --store or --output"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--output", "OUT"], "got --store and --output"),
        (
            ["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--slice", "1/2"],
            "--slice is for target datasets",
        ),
        (["fill", "scripted", "DATA", *SCRIPTED, "--output", "OUT", "--slice", "3/2"], "--slice 3/2: expected I/N"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--output", "OUT", "--shard-tokens", "0"], "--shard-tokens 0"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--output", "nowhere://x"], "cannot open 'nowhere://x'"),
        (["dataset", "check", "OUT"], "there is no target dataset at"),
        (["dataset", "stats", "OUT", "OUT"], "takes one URL, got 2"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    write_data(tmp_path / "data.jsonl", 2)
    places = {"DATA": tmp_path / "data.jsonl", "STORE": tmp_path / "store", "OUT": tmp_path / "out"}
    done = command(*(places.get(word, word) for word in words))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_another_teacher_or_question_does_not_come_into_a_dataset(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl", 3)
    fill(tmp_path / "data.jsonl", tmp_path / "out")
    other = fill(tmp_path / "data.jsonl", tmp_path / "out", "--script", '{"identity": {"semantic.dtype": "float16"}}')
    assert other.returncode == 2 and "teacher.semantic.dtype: float16 vs float32" in other.stderr
    asked = fill(tmp_path / "data.jsonl", tmp_path / "out", "--top-k", "4")
    assert asked.returncode == 2 and "query.top_k: 4 vs 16" in asked.stderr
