"""`stillhouse-teacher fill` and `pack` as commands: what they fill is what a service answers, byte for byte."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.requests import TargetsRequest
from teacher_proto.store.target_store import TargetStore
from tests.teacher_process import TeacherProcess
from tests.unit.proto.fake_teacher import same_bits

SCRIPTED = ("--engine", "scripted")
ASK = ("--top-k", "16", "--temperatures", "2,5")


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "teacher_service.main", *map(str, words)], capture_output=True, text=True, timeout=60
    )


def write_data(path: Path, number: int, length: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(0)
    rows: list[list[int]] = [rng.integers(0, 512, length).tolist() for _ in range(number)]
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    return rows


def test_filled_coalesced_stored_and_online_answers_are_the_same_bytes(tmp_path: Path) -> None:
    rows = write_data(tmp_path / "data.jsonl", 20)
    done = command("fill", "scripted", tmp_path / "data.jsonl", *SCRIPTED, "--store", tmp_path / "store", *ASK)
    assert done.returncode == 0 and "20 sequences scored (800 tokens" in done.stdout, done.stderr
    # Every sequence twice: the second of each is coalesced with the first.
    request = TargetsRequest(sequences=tuple(rows * 2), top_k=16, temperatures=(2.0, 5.0))
    with TeacherProcess() as online, SyncTeacherClient(online.url) as client:
        computed = client.targets(request)
    with TeacherProcess("--store", str(tmp_path / "store")) as offline, SyncTeacherClient(offline.url) as client:
        filled = client.targets(request)
        import httpx

        # The client's canary is the one thing that the store did not hold.
        assert httpx.get(f"{offline.url}/v1/status").json()["sources"] == {"engine": 80, "store": 40 * 40}
    assert all(same_bits(a, b) for a, b in zip(computed, filled, strict=True))
    assert all(same_bits(a, b) for a, b in zip(computed[:20], computed[20:], strict=True))


def written(store: Path) -> int:
    """Entries that a kill can no longer take from the store."""
    try:
        with TargetStore(store, readonly=True) as reader:
            return reader.stats().entries
    except ValueError:  # not made yet
        return 0


def test_a_killed_fill_goes_on_where_it_was(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl", 300)
    words = ["fill", "scripted", str(tmp_path / "data.jsonl"), *SCRIPTED, "--store", str(tmp_path / "store"), *ASK]
    slow = ["--window", "100", "--script", '{"delay_s": 0.02}']
    process = subprocess.Popen([sys.executable, "-m", "teacher_service.main", *words, *slow])
    deadline = time.monotonic() + 40
    while not written(tmp_path / "store"):
        assert process.poll() is None and time.monotonic() < deadline, "nothing was written"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = command(*words)
    assert done.returncode == 0, done.stderr
    scored = int(done.stdout.split(" sequences scored")[0].rpartition(" ")[2])
    assert 0 < scored < 300 and f"{300 - scored} already stored" in done.stdout
    again = command(*words)
    assert "0 sequences scored" in again.stdout and "300 already stored" in again.stdout


def test_a_store_goes_to_parquet_and_back(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl", 10)
    command("fill", "scripted", tmp_path / "data.jsonl", *SCRIPTED, "--store", tmp_path / "one", *ASK)
    out = command("pack", "export", tmp_path / "one", tmp_path / "files")
    back = command("pack", "import", tmp_path / "two", tmp_path / "files")
    assert out.returncode == back.returncode == 0
    assert "10 entries in 1 files" in out.stdout == back.stdout
    with TargetStore(tmp_path / "one", readonly=True) as one, TargetStore(tmp_path / "two", readonly=True) as two:
        pairs = list(zip(one.entries(), two.entries(), strict=True))
        assert len(pairs) == 10 and all(same_bits(a, b) for (_, a), (_, b) in pairs)


def test_rows_of_another_teacher_do_not_come_into_a_store(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl", 10)
    other = ["--script", '{"identity": {"semantic.dtype": "float16"}}']
    command("fill", "scripted", tmp_path / "data.jsonl", *SCRIPTED, "--store", tmp_path / "theirs", *ASK, *other)
    command("pack", "export", tmp_path / "theirs", tmp_path / "files")
    write_data(tmp_path / "few.jsonl", 3)
    command("fill", "scripted", tmp_path / "few.jsonl", *SCRIPTED, "--store", tmp_path / "ours", *ASK)
    refused = command("pack", "import", tmp_path / "ours", tmp_path / "files")
    assert refused.returncode == 2 and "semantic.dtype: expected float32, got float16" in refused.stderr, refused.stderr
    assert written(tmp_path / "ours") == 3
    fingerprint = refused.stderr.rpartition("--teacher ")[2].split()[0]
    taken = command("pack", "import", tmp_path / "ours", tmp_path / "files", "--teacher", fingerprint)
    assert taken.returncode == 0, taken.stderr
    assert written(tmp_path / "ours") == 13


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fill"], "MODEL is missing"),
        (["fill", "scripted"], "DATA is missing"),
        (["fill", "scripted", "--engine", "scripted"], "DATA is missing"),
        (["fill", "scripted", "DATA", *SCRIPTED], "expected --store or --output"),
        (["fill", "scripted", "/nowhere", *SCRIPTED, "--store", "STORE"], "no data at /nowhere"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--kinds", "gather"], "--kinds gather"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--kinds", "topk"], "--kinds: Input should be"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--top-k", "0"], "expected 1 to 256"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--temperatures", "0"], "--temperatures: "),
        (["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--temperatures", "hot"], "hot"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--max-length", "9999"], "1 to 2048 tokens"),
        (["fill", "scripted", "DATA", *SCRIPTED, "--store", "STORE", "--top-kay", "3"], "--top-kay"),
        (["pack", "export", "/nowhere", "FILES"], "there is no target store at /nowhere"),
        (["pack", "import", "STORE", "/nowhere"], "there are no Parquet files at /nowhere"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    write_data(tmp_path / "data.jsonl", 2)
    places = {"DATA": tmp_path / "data.jsonl", "STORE": tmp_path / "store", "FILES": tmp_path / "files"}
    done = command(*(places.get(word, word) for word in words))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    # On a busy machine the imports take long enough to be spoken of.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("importing libraries: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr


def test_sequences_that_fail_are_told_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"tokens": [1, 2]}\n{"tokens": [7, 2]}\n')
    words = ["fill", "scripted", tmp_path / "data.jsonl", *SCRIPTED, "--store", tmp_path / "store"]
    done = command(*words, "--script", '{"poison_token": 7}')
    assert done.returncode == 1 and "1 failed" in done.stdout and "fails on token 7" in done.stderr
    died = command(*words, "--script", '{"die_token": 7}')
    assert died.returncode == 70 and "the engine died" in died.stderr and "Traceback" not in died.stderr
