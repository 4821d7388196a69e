"""A target store that several processes use at once: one that grows, is checked, or whose check is interrupted is never
taken for damaged, and one that is damaged is not put aside under those who use it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from teacher_proto.store import verify
from teacher_proto.store.target_store import TargetStore
from teacher_proto.store.verify import UncheckedError, check
from tests.chaos.test_store import WRITER, start, stored
from tests.unit.proto.fake_teacher import same_bits
from tests.unit.proto.test_store import FINGERPRINT, put, truth

LIMIT = 256 * 2**20
# Entries of a megabyte or so, so that a few of them are more than LMDB's own default map.
BIG_WRITER = """
import sys
from teacher_proto.store.target_store import TargetStore
from tests.unit.proto.test_store import FINGERPRINT, ask, truth
with TargetStore(sys.argv[1], int(sys.argv[2])) as store:
    for line in sys.stdin:
        one = ask(seed=int(line), length=2000, top_k=100)
        store.put(FINGERPRINT, one, truth(one))
        print(line, end="", flush=True)
"""
# Opens the store again and again, as starts do; says how often.
OPENER = """
import sys
from teacher_proto.store.target_store import TargetStore
for number in range(int(sys.argv[3])):
    TargetStore(sys.argv[1], int(sys.argv[2])).close()
    print(number, flush=True)
"""


# Begins to read so many times, and never ends.
READER = """
import sys, time, lmdb
env = lmdb.open(sys.argv[1], readonly=True, max_dbs=8, max_readers=512, map_size=2**30)
transactions = [env.begin() for _ in range(int(sys.argv[2]))]
print("reading", flush=True)
time.sleep(600)
"""


def start_reader(path: Path, transactions: int) -> subprocess.Popen[str]:
    reader = start(READER, path, transactions)
    assert reader.stdout is not None and reader.stdout.readline() == "reading\n"
    return reader


def kill_reader(reader: subprocess.Popen[str]) -> None:
    reader.kill()
    reader.communicate()


def big(number: int):  # type: ignore[no-untyped-def]
    from tests.unit.proto.test_store import ask

    return ask(seed=number, length=2000, top_k=100)


def damaged_files(path: Path) -> list[Path]:
    return list(path.glob("*.damaged*"))


@pytest.mark.parametrize("map_size", [verify.READER_MAP, 0], ids=["roomy map", "map of the file's size"])
def test_a_store_may_grow_under_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, map_size: int) -> None:
    monkeypatch.setattr(verify, "READER_MAP", map_size)
    with TargetStore(tmp_path, 2**20) as store:
        put(store, stored(0))
    with TargetStore(tmp_path, readonly=True) as reader:
        writer = start(BIG_WRITER, tmp_path, LIMIT, stdin=subprocess.PIPE)
        assert writer.stdin is not None and writer.stdout is not None
        for number in range(24):
            writer.stdin.write(f"{number}\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == f"{number}\n"
            answer = reader.get(FINGERPRINT, big(number))
            assert answer is not None and same_bits(answer, truth(big(number)))
        writer.communicate(timeout=60)
        assert (tmp_path / "data.mdb").stat().st_size > 12 * 2**20
        assert reader.stats().damaged == 0


def test_a_writer_goes_on_where_another_one_with_a_larger_limit_let_the_file_grow(tmp_path: Path) -> None:
    with TargetStore(tmp_path, 8 * 2**20) as small:
        put(small, stored(0))
        grown = start(BIG_WRITER.replace("sys.stdin", "map(str, range(40))"), tmp_path, LIMIT)
        _, errors = grown.communicate(timeout=120)
        assert grown.returncode == 0, errors
        put(small, stored(1))
        answer = small.get(FINGERPRINT, stored(1))
        assert answer is not None and same_bits(answer, truth(stored(1)))
        assert small.stats().damaged == small.stats().refused == 0


@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_store_that_is_checked_while_somebody_writes_is_not_damaged(tmp_path: Path, times: int) -> None:
    writer = start(WRITER, tmp_path, 4 * 2**20, 0, 10**6)
    assert writer.stdout is not None and writer.stdout.readline()
    try:
        # What `check` runs in a process of its own, without the start of an interpreter each time.
        faults = [verify._fault(tmp_path) for _ in range(times)]
        opener = start(OPENER, tmp_path, 4 * 2**20, max(2, times // 10))
        _, errors = opener.communicate(timeout=600)
        assert opener.returncode == 0, errors
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()
    assert faults == [None] * times
    assert not damaged_files(tmp_path)


def test_a_reader_that_was_killed_while_it_read_does_not_keep_evicted_pages(tmp_path: Path) -> None:
    with TargetStore(tmp_path, 4 * 2**20) as store:
        put(store, *(stored(number) for number in range(400)))
        kill_reader(start_reader(tmp_path, 1))
        put(store, *(stored(number) for number in range(400, 1200)))
        answer = store.get(FINGERPRINT, stored(1199))
        assert answer is not None and same_bits(answer, truth(stored(1199)))
        # A few, until the pages are found to be free.
        assert store.stats().refused < 40


def test_ctrl_c_in_the_check_puts_nothing_aside(tmp_path: Path) -> None:
    with TargetStore(tmp_path, LIMIT) as store:
        put(store, *(stored(number) for number in range(20)))
    # A terminal sends SIGINT to all of the group, the check's process with it.
    for wait_s in (0.02, 0.1, 0.3, 0.6):
        opening = start(OPENER, tmp_path, LIMIT, 1000, start_new_session=True)
        assert opening.stdout is not None and opening.stdout.readline() == "0\n"
        time.sleep(wait_s)
        os.killpg(opening.pid, signal.SIGINT)
        _, errors = opening.communicate(timeout=60)
        assert opening.returncode != 0 and "KeyboardInterrupt" in errors, errors
        assert not damaged_files(tmp_path)
    assert check(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_somebody_ends_says_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    with TargetStore(tmp_path, LIMIT) as store:
        put(store, stored(0))
    # Where the tests run in the background of a shell, their children are born with SIGINT ignored.
    dies = f"import os, signal; number = {int(number)}; number == 9 or signal.signal(number, signal.SIG_DFL)"
    ended = [sys.executable, "-c", f"{dies}; os.kill(os.getpid(), number)"]
    real = subprocess.run
    monkeypatch.setattr(verify.subprocess, "run", lambda command, **named: real(ended, **named))
    with pytest.raises(UncheckedError, match="could not check the target store"):
        TargetStore(tmp_path, LIMIT)
    # Nor does one that could not begin.
    ended[2] = "raise MemoryError('no room for an interpreter')"
    with pytest.raises(UncheckedError, match="no room for an interpreter"):
        TargetStore(tmp_path, LIMIT)
    assert not damaged_files(tmp_path)


def test_too_many_readers_are_no_damage_and_killed_ones_leave_their_places(tmp_path: Path) -> None:
    with TargetStore(tmp_path, LIMIT) as store:
        put(store, stored(0))
        reader = start_reader(tmp_path, 512)
        try:
            assert store.get(FINGERPRINT, stored(0)) is None
        finally:
            kill_reader(reader)
        answer = store.get(FINGERPRINT, stored(0))
        assert answer is not None and same_bits(answer, truth(stored(0)))
        assert store.stats().damaged == 0


def test_a_damaged_store_is_put_aside_once_and_not_under_those_who_have_it_open(tmp_path: Path) -> None:
    with TargetStore(tmp_path, LIMIT) as store:
        put(store, *(stored(number) for number in range(20)))
    living = start(BIG_WRITER, tmp_path, LIMIT, stdin=subprocess.PIPE)
    assert living.stdin is not None and living.stdout is not None
    living.stdin.write("0\n")
    living.stdin.flush()
    assert living.stdout.readline() == "0\n"
    with (tmp_path / "data.mdb").open("r+b") as file:
        file.truncate((tmp_path / "data.mdb").stat().st_size // 2)
    with pytest.raises(ValueError, match="another process has it open"):
        TargetStore(tmp_path, LIMIT)
    assert not damaged_files(tmp_path)
    living.kill()
    living.communicate()
    # Two starts at once: one puts it aside, both go on.
    starts = [start(OPENER, tmp_path, LIMIT, 1) for _ in range(2)]
    for process in starts:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(damaged_files(tmp_path)) == 1
