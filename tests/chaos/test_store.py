"""The target store under kills, rivals and disks that lie: an answer is right, or it is a miss."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from teacher_proto.store.target_store import TargetStore
from teacher_proto.store.verify import check as check_file
from tests.unit.proto.fake_teacher import same_bits
from tests.unit.proto.test_store import FINGERPRINT, ask, put, truth

# Writes entries from one number to another, and says so of each that is on disk. A small store evicts all the time.
WRITER = """
import sys
from teacher_proto.store.target_store import TargetStore
from tests.unit.proto.test_store import FINGERPRINT, ask, truth
path, limit, first, last = sys.argv[1], *map(int, sys.argv[2:])
with TargetStore(path, limit) as store:
    for number in range(first, last):
        one = ask(seed=number, length=40 + number % 200, top_k=16)
        store.put(FINGERPRINT, one, truth(one))
        print(number, flush=True)
"""
# Reads everything that may be there, and exits with 3 where an answer is wrong. Writes again what it misses.
READER = """
import sys
from teacher_proto.store.target_store import TargetStore
from tests.unit.proto.fake_teacher import same_bits
from tests.unit.proto.test_store import FINGERPRINT, ask, truth
limit, last, *paths = *map(int, sys.argv[1:3]), *sys.argv[3:]
asked = [ask(seed=number, length=40 + number % 200, top_k=16) for number in range(last)]
truths = [truth(one) for one in asked]
for path in paths:
    with TargetStore(path, limit) as store:
        hits = 0
        for round in range(2):
            for one, true in zip(asked, truths):
                answer = store.get(FINGERPRINT, one)
                if answer is not None and not same_bits(answer, true):
                    sys.exit(3)
                hits += answer is not None
                if answer is None and round == 0:
                    store.put(FINGERPRINT, one, true)
        print(hits)
"""


def stored(number: int):  # type: ignore[no-untyped-def]
    return ask(seed=number, length=40 + number % 200, top_k=16)


def start(script: str, *arguments: object, **how: Any) -> subprocess.Popen[str]:
    """A process that obeys SIGINT, also where the tests run in the background of a shell, which ignores it."""
    path = os.pathsep.join(filter(None, (".", os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **how,
    )  # fmt: skip


@pytest.mark.parametrize("limit", [256 * 2**20, 2 * 2**20], ids=["roomy", "evicting"])
def test_killed_at_any_moment_everything_that_was_said_to_be_written_is_there(tmp_path: Path, limit: int) -> None:
    rng, number = random.Random(limit), 0
    for _ in range(4):
        writer = start(WRITER, tmp_path, limit, number, 10**6)
        assert writer.stdout is not None
        said = [int(writer.stdout.readline())]
        time.sleep(rng.uniform(0, 0.4))
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.communicate()[0].split()]
        assert check_file(tmp_path) is None
        with TargetStore(tmp_path, limit, readonly=True) as store:
            answers = {one: store.get(FINGERPRINT, stored(one)) for one in range(said[-1] + 1)}
            assert all(answer is None or same_bits(answer, truth(stored(one))) for one, answer in answers.items())
            kept = [one for one, answer in answers.items() if answer is not None]
            assert kept == list(range(said[-1] + 1 - len(kept), said[-1] + 1)), "the latest stay, without a gap"
            assert limit < 10 * 2**20 or len(kept) == said[-1] + 1
            number = said[-1] + 1
    assert not list(tmp_path.glob("*.damaged*"))


def test_two_processes_write_one_store(tmp_path: Path) -> None:
    limit = 256 * 2**20
    writers = [start(WRITER, tmp_path, limit, first, last) for first, last in ((0, 60), (30, 90))]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    with TargetStore(tmp_path, limit) as store:
        assert store.stats().entries == 90
        for number in range(90):
            answer = store.get(FINGERPRINT, stored(number))
            assert answer is not None and same_bits(answer, truth(stored(number)))


def test_reading_goes_on_while_another_process_evicts(tmp_path: Path) -> None:
    limit = 2 * 2**20
    writer = start(WRITER, tmp_path, limit, 0, 300)
    assert writer.stdout is not None and writer.stdout.readline()
    readers = [start(READER, limit, 60, tmp_path) for _ in range(2)]
    for process in (writer, *readers):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert (tmp_path / "data.mdb").stat().st_size <= limit


@pytest.mark.parametrize("part", ["bit", "page head", "page", "cut"])
def test_whatever_a_disk_did_to_the_file_no_answer_is_wrong(tmp_path: Path, part: str) -> None:
    original, limit = tmp_path / "original", 64 * 2**20
    with TargetStore(original, limit) as store:
        put(store, *(stored(number) for number in range(30)))
    whole = (original / "data.mdb").read_bytes()
    rng, folders = random.Random(part), [tmp_path / str(attempt) for attempt in range(16)]
    for folder in folders:
        folder.mkdir()
        (folder / "data.mdb").write_bytes(_spoilt(whole, part, rng))
    reader = start(READER, limit, 30, *folders)
    said, errors = reader.communicate(timeout=120)
    assert reader.returncode == 0, errors
    hits = [int(line) for line in said.split()]
    assert len(hits) == len(folders)
    assert all(30 <= n <= 60 for n in hits), "what was missed was written again, and read in the second round"


def _spoilt(whole: bytes, part: str, rng: random.Random) -> bytes:
    spoilt = bytearray(whole)
    page = rng.randrange(len(whole) // 4096) * 4096
    if part == "bit":
        spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    elif part == "page head":
        spoilt[page + rng.randrange(64)] ^= 1 << rng.randrange(8)
    elif part == "page":
        spoilt[page : page + 4096] = rng.randbytes(4096)
    else:
        del spoilt[rng.randrange(len(whole)) :]
    return bytes(spoilt)
