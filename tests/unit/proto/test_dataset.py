"""A target dataset: answers come back bit for bit from any folder, in whole shards, found by an index."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import fsspec.implementations.memory
import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from teacher_proto.dataset.check import check_dataset, dataset_stats, merge_dataset
from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.dataset.folder import QUIET_S, Folder
from teacher_proto.dataset.index import Index, IndexFile, encode_index
from teacher_proto.dataset.listing import remove_unfinished, unfinished_files
from teacher_proto.dataset.manifest import Manifest
from teacher_proto.requests import KINDS, Query
from teacher_proto.store.entry import split
from teacher_proto.store.parquet_read import import_parquet
from teacher_proto.store.target_store import TargetStore
from tests.unit.proto.fake_teacher import Replica, same_bits
from tests.unit.proto.test_store import VOCAB, ask, truth

INFO = Replica().info.model_copy(update={"limits": Replica().info.limits.model_copy(update={"vocab_size": VOCAB})})
FINGERPRINT = INFO.fingerprint
ASKED = [ask(seed=n, length=10 + n) for n in range(8)]
MANIFEST = Manifest(INFO, ASKED[0].spec)


def documents(*asked: Query) -> list[Any]:
    return [split(FINGERPRINT, one, truth(one)) for one in asked]


def fill(url: str, *shards: list[Query], manifest: Manifest = MANIFEST) -> None:
    with TargetDataset(url, create=manifest) as dataset:
        for asked in shards:
            dataset.add_shard(documents(*asked))


def holds(dataset: TargetDataset, asked: Query) -> bool:
    answer = dataset.get(FINGERPRINT, asked)
    return answer is not None and same_bits(answer, truth(asked))


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "data") if request.param == "local" else f"memory://{tmp_path.name}"


@pytest.mark.parametrize("kinds", [("top_k",), ("top_k", "sampled"), ("hidden",), ("score",)], ids=str)
def test_what_went_in_comes_out_bit_for_bit(url: str, kinds: Any) -> None:
    asked = [ask(kinds=kinds, seed=n, length=10 + n) for n in range(8)]
    fill(url, asked[:5], asked[5:], manifest=Manifest(INFO, asked[0].spec))
    with TargetDataset(url, readonly=True) as dataset:
        assert all(holds(dataset, one) for one in asked)
        part = Query(asked[3].tokens_T, (2, 7), asked[3].spec)
        assert holds(dataset, part)
        assert dataset.get(FINGERPRINT, ask(kinds=kinds, seed=99)) is None
        assert dataset.holds([asked[0].tokens_T, ask(seed=99).tokens_T]).tolist() == [True, False]
        assert dataset.teachers() == [INFO]


def test_a_shard_is_a_parquet_file_for_anybody_and_for_pack(tmp_path: Path) -> None:
    fill(str(tmp_path / "data"), ASKED)
    (shard,) = (tmp_path / "data" / "shards").iterdir()
    for row in pq.read_table(shard).to_pylist():
        assert len(row["ids"]) == len(row["logprobs"]) == (row["stop"] - row["start"]) * row["top_k"]
    query = f"select sum(len(tokens)), sum(len(ids)), min(fingerprint) from '{shard}'"
    total = sum(one.num_tokens for one in ASKED)
    assert duckdb.sql(query).fetchall() == [(total, 8 * total, FINGERPRINT)]
    with TargetStore(tmp_path / "store", 2**26) as store:
        assert import_parquet(shard.parent, store).entries == len(ASKED)
        answer = store.get(FINGERPRINT, ASKED[0])
        assert answer is not None and same_bits(answer, truth(ASKED[0]))


def test_the_same_answers_are_the_same_object_whoever_writes_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(str(tmp_path / name), ASKED[:4], ASKED[4:])
    ones = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    twos = {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.*")}
    assert ones == twos and len(ones) == 5
    fill(str(tmp_path / "one"), ASKED[:4])
    assert dataset_stats(Folder(str(tmp_path / "one"))).documents == len(ASKED)


def test_what_is_put_is_found_at_once_and_written_when_it_is_closed(url: str) -> None:
    fill(url, ASKED[:2])
    with TargetDataset(url) as dataset:
        for one in ASKED[2:5]:
            dataset.put_entries(split(FINGERPRINT, one, truth(one)))
            dataset.put_entries(split(FINGERPRINT, one, truth(one)))
        assert all(holds(dataset, one) for one in ASKED[:5])
        assert len(dataset.index.shards) == 1
    stats = dataset_stats(Folder(url))
    assert (stats.shards, stats.documents, stats.twice, stats.without_index) == (2, 5, 0, 0)
    assert stats.tokens == stats.rows == sum(one.num_tokens for one in ASKED[:5])


def test_many_indices_become_one(url: str) -> None:
    fill(url, *([one] for one in ASKED[:5]))
    folder = Folder(url)
    assert merge_dataset(folder) == 5
    fill(url, ASKED[5:7], ASKED[7:])
    with TargetDataset(url, readonly=True) as dataset:
        assert all(holds(dataset, one) for one in ASKED)
    assert merge_dataset(folder) == 7
    merged = [name for name in folder.list("index") if name.startswith("merged-")]
    assert len(merged) == 1
    for name in folder.list("index"):
        if name not in merged:
            folder.remove(f"index/{name}")
    with TargetDataset(url, readonly=True) as dataset:
        assert all(holds(dataset, one) for one in ASKED)
    assert list(check_dataset(folder)) == []


def test_datasets_that_were_filled_apart_are_put_together(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    fill(one, ASKED[:4])
    fill(two, ASKED[:4], ASKED[4:])
    assert merge_dataset(Folder(one), [Folder(two)]) == 2
    with TargetDataset(one, readonly=True) as dataset:
        assert all(holds(dataset, asked) for asked in ASKED)
    other = str(tmp_path / "other")
    fill(other, [ask(top_k=4)], manifest=Manifest(INFO, ask(top_k=4).spec))
    with pytest.raises(ValueError, match=r"are different datasets.*query\.top_k: 8 vs 4"):
        merge_dataset(Folder(one), [Folder(other)])


def test_an_index_of_many_parts_finds_what_one_finds() -> None:
    rng = np.random.default_rng(0)
    with_notes = []
    for number in range(40):
        keys = rng.integers(0, 2**64, 50, dtype=np.uint64)
        note = IndexFile(encode_index([(_note(f"s{number}"), keys, np.arange(50) % 3)]), "x")
        with_notes.append((note, keys))
    index = Index(file for file, _ in with_notes)
    whole = Index([IndexFile(encode_index(list(index.by_shard())), "x")])
    for number, (_, keys) in enumerate(with_notes):
        assert index.contains(keys).all() and whole.contains(keys).all()
        for at in range(0, 50, 7):
            for one in (index, whole):
                (place,) = one.places(int(keys[at]))
                assert (place.shard.name, place.group) == (f"s{number}", at % 3)
    assert index.distinct() == 2000 and not index.contains(np.array([5], np.uint64)).any()


def _note(name: str) -> Any:
    from teacher_proto.dataset.index import ShardNote

    return ShardNote(name, 10, "sha", 5, 50, 50, 50, np.array([(0, 1, 1), (1, 1, 1), (2, 1, 1)]))


class Counting(fsspec.implementations.memory.MemoryFileSystem):  # type: ignore[misc]
    """A bucket that counts ranges, and answers 503 as often as it is told to."""

    protocol = "counting"
    ranges = 0
    failures = 0
    cachable = False

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        if type(self).failures > 0:
            type(self).failures -= 1
            raise OSError(16, "503 Slow Down")
        type(self).ranges += start is not None
        return bytes(super().cat_file(path, start=start, end=end, **more))

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        if type(self).failures > 0:
            type(self).failures -= 1
            raise OSError(16, "503 Slow Down")
        super().pipe_file(path, value, **more)


fsspec.register_implementation("counting", Counting, clobber=True)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_proto.dataset.shards.GROUP_BYTES", 1000)


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_row_group_is_one_request_and_is_kept_within_bounds(tmp_path: Path, small_groups: None, ahead: int) -> None:
    url = f"counting://{tmp_path.name}"
    fill(url, ASKED)
    Counting.ranges = 0
    cache = tmp_path / "cache"
    with TargetDataset(url, readonly=True, cache=cache, ahead=ahead, cache_bytes=2**20) as dataset:
        (note,) = dataset.index.shards.values()
        assert len(note.groups) == 4
        for number in np.random.default_rng(0).permutation(8).tolist() * 3:
            assert holds(dataset, ASKED[number])
        # One for each row group, and one for the footer.
        assert Counting.ranges == dataset.ranges.requests == 5
    with TargetDataset(url, readonly=True, cache=cache, ahead=0) as dataset:
        assert all(holds(dataset, one) for one in ASKED)
        assert dataset.ranges.requests == 0
    with TargetDataset(url, readonly=True, cache=cache, ahead=0, cache_bytes=3000) as dataset:
        assert all(holds(dataset, one) for one in ASKED)
        kept = sum(path.stat().st_size for path in cache.iterdir())
        assert kept <= 3000 or len(list(cache.iterdir())) == 1


def test_whatever_a_disk_did_to_the_cache_is_fetched_again(tmp_path: Path, small_groups: None) -> None:
    url, cache = f"counting://{tmp_path.name}", tmp_path / "cache"
    fill(url, ASKED[:4], ASKED[4:])
    merge_dataset(Folder(url))
    with TargetDataset(url, readonly=True, cache=cache, ahead=0) as dataset:
        assert all(holds(dataset, one) for one in ASKED)
    kept = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(kept) > 4 and any(path.suffix == ".idx" for path in kept)
    draw = np.random.default_rng(0)
    for path, data in kept.items():
        flipped = [bytearray(data) for _ in range(20)]
        for one in flipped:
            one[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
        for damaged in (*map(bytes, flipped), b"", data[:-1], bytes(len(data))):
            path.write_bytes(damaged)
            with TargetDataset(url, readonly=True, cache=cache, ahead=0) as dataset:
                assert all(holds(dataset, one) for one in ASKED)
                assert path.suffix == ".idx" or dataset.ranges.requests == 1
            assert path.read_bytes() == data


def test_a_cache_that_can_not_be_written_costs_requests_alone(
    tmp_path: Path, small_groups: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url, cache = f"counting://{tmp_path.name}", tmp_path / "cache"
    fill(url, ASKED)
    merge_dataset(Folder(url))

    def full(disk: LocalFileSystem, path: str, value: bytes, **_: Any) -> None:
        Path(path).touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", full)
    with TargetDataset(url, readonly=True, cache=cache, ahead=0) as dataset:
        assert all(holds(dataset, one) for one in ASKED)
    assert list(cache.iterdir()) == []
    assert caplog.text.count("is fetched again each time") == caplog.text.count("the index is in memory") == 1


def test_what_a_killed_process_left_in_the_cache_is_removed_when_it_is_old(tmp_path: Path) -> None:
    url, cache = f"memory://{tmp_path.name}", tmp_path / "cache"
    fill(url, ASKED)
    cache.mkdir()
    old, young = (cache / f".one-group-0.{uuid.uuid4().hex}" for _ in range(2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    TargetDataset(url, readonly=True, cache=cache).close()
    assert not old.exists() and young.exists()


def test_shards_are_copied_into_a_bucket_with_a_merged_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = (f"memory://{tmp_path.name}-{name}" for name in ("ours", "theirs"))
    fill(ours, ASKED[:4])
    fill(theirs, ASKED[4:])
    merge_dataset(Folder(ours))
    assert merge_dataset(Folder(ours), [Folder(theirs)]) == 2
    with TargetDataset(ours, readonly=True) as dataset:
        assert all(holds(dataset, one) for one in ASKED)
    assert not caplog.text


def test_a_bucket_that_answers_503_for_a_while_is_outlasted(tmp_path: Path) -> None:
    slept: list[float] = []
    url = f"counting://{tmp_path.name}"
    Counting.failures = 5
    folder = Folder(url, sleep=slept.append)
    folder.write("x", b"data")
    Counting.failures = 5
    assert folder.read("x") == b"data" and len(slept) == 10
    Counting.failures = 1000
    with pytest.raises(OSError, match=r"reading counting://.*/x has failed for .*503 Slow Down"):
        Folder(url, outage_s=0.0, sleep=slept.append).read("x")
    Counting.failures = 0


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_truncated_shard_is_told_by_its_name(tmp_path: Path, small_groups: None) -> None:
    fill(str(tmp_path), ASKED)
    shard = only(tmp_path / "shards")
    data = shard.read_bytes()
    with TargetDataset(str(tmp_path), readonly=True) as dataset:
        shard.write_bytes(data[: len(data) // 3])
        with pytest.raises(ValueError, match=r"targets-.*is truncated"):
            for one in ASKED:
                dataset.get(FINGERPRINT, one)
    for what in (lambda: TargetDataset(str(tmp_path)), lambda: merge_dataset(Folder(str(tmp_path)))):
        with pytest.raises(ValueError, match=rf"is truncated to {len(data) // 3} of {len(data)} bytes: remove it"):
            what()
    assert any("is truncated to" in line for line in check_dataset(Folder(str(tmp_path))))


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    fill(str(tmp_path), ASKED)
    shard = only(tmp_path / "shards")
    data = bytearray(shard.read_bytes())
    data[1500] ^= 1
    shard.write_bytes(data)
    (line,) = check_dataset(Folder(str(tmp_path)))
    assert "has changed since it was written" in line
    with TargetDataset(str(tmp_path), readonly=True) as dataset, pytest.raises(ValueError, match="targets-"):
        for one in ASKED:
            assert holds(dataset, one)


def test_a_missing_shard_is_told_with_its_tokens(tmp_path: Path) -> None:
    fill(str(tmp_path), ASKED[:4], ASKED[4:])
    sorted((tmp_path / "shards").iterdir())[0].unlink()
    with pytest.raises(ValueError, match=r"with \d+ tokens is missing: restore it, or remove"):
        TargetDataset(str(tmp_path))
    assert sum("is missing" in line for line in check_dataset(Folder(str(tmp_path)))) == 1


def test_a_shard_that_is_newer_than_the_index_counts_once_it_is_merged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(str(tmp_path), ASKED[:4])
    fill(str(tmp_path), ASKED[4:])
    index = next((tmp_path / "index").iterdir())
    index.unlink()
    with TargetDataset(str(tmp_path), readonly=True) as dataset:
        assert len(dataset.without_index) == 1 and "newer than the index" in caplog.text
        assert sum(holds(dataset, one) for one in ASKED) == 4
    assert sum("is in no index" in line for line in check_dataset(Folder(str(tmp_path)))) == 1
    assert merge_dataset(Folder(str(tmp_path))) == 2
    with TargetDataset(str(tmp_path), readonly=True) as dataset:
        assert all(holds(dataset, one) for one in ASKED) and not dataset.without_index


def test_an_index_that_is_older_than_its_shard_is_refused(tmp_path: Path) -> None:
    fill(str(tmp_path), ASKED[:2])
    shard = only(tmp_path / "shards")
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(ValueError, match="the index is older than its shard"):
        TargetDataset(str(tmp_path))
    index = only(tmp_path / "index")
    index.write_bytes(index.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is truncated or has changed"):
        TargetDataset(str(tmp_path))


def other_manifest() -> Manifest:
    semantic = INFO.identity.semantic.model_copy(update={"dtype": "bfloat16"})
    identity = INFO.identity.model_copy(update={"semantic": semantic})
    info = INFO.model_copy(update={"identity": identity, "fingerprint": identity.fingerprint})
    return Manifest(info, MANIFEST.spec)


def test_a_dataset_is_one_teachers_and_one_querys(tmp_path: Path) -> None:
    fill(str(tmp_path), ASKED)
    with pytest.raises(ValueError, match=r"settings differ .* \(teacher\.semantic\.dtype: bfloat16 vs float32"):
        fill(str(tmp_path), ASKED, manifest=other_manifest())
    with pytest.raises(ValueError, match=r"query\.top_k: 4 vs 8"):
        fill(str(tmp_path), ASKED, manifest=Manifest(INFO, ask(top_k=4).spec))
    with TargetDataset(str(tmp_path)) as dataset:
        with pytest.raises(ValueError, match=r"from another teacher: semantic\.dtype"):
            dataset.remember(other_manifest().teacher)
        assert dataset.covers(ask(top_k=4, temperatures=(2.0,)).spec) and dataset.covers(ask(kinds=("score",)).spec)
        assert not dataset.covers(ask(top_k=9).spec) and not dataset.covers(ask(temperatures=(3.0,)).spec)
        assert not dataset.covers(ask(kinds=KINDS).spec)


def test_two_manifests_and_a_manifest_of_another_teacher_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    fill(str(one), ASKED)
    fill(str(two), ASKED, manifest=other_manifest())
    (ours,), (theirs,) = one.glob("manifest-*"), two.glob("manifest-*")
    (one / theirs.name).write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match=r"has 2 manifests.*teacher\.semantic\.dtype"):
        TargetDataset(str(one))
    ours.unlink()
    with TargetDataset(str(one), readonly=True) as dataset, pytest.raises(ValueError, match="was written for da"):
        dataset.get(FINGERPRINT, ASKED[0])
    assert any("was put into another dataset's folder" in line for line in check_dataset(Folder(str(one))))
    (one / theirs.name).write_bytes(theirs.read_bytes().replace(b"bfloat16", b"float16"))
    with pytest.raises(ValueError, match=r"is not a manifest of a target dataset|has changed since"):
        TargetDataset(str(one))


def test_no_dataset_and_no_file_system_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no target dataset at .*fill --output"):
        TargetDataset(str(tmp_path))
    with pytest.raises(ValueError, match="cannot open 'nowhere://x'"):
        TargetDataset("nowhere://x")


def test_a_writer_that_is_killed_leaves_whole_shards_or_none(tmp_path: Path) -> None:
    """A process that dies while it writes: what has its name is whole, what has not is no shard."""
    code = f"""
import os, teacher_proto.dataset.folder as folder
from tests.unit.proto.test_dataset import *
write = folder.Folder._write
def half(self, path, data):
    if path.endswith(".parquet"):
        pipe = self.fs.pipe_file
        def die(path, data):
            pipe(path, data[: len(data) // 2])
            os._exit(9)
        self.fs.pipe_file = die
    write(self, path, data)
folder.Folder._write = half
fill({str(tmp_path)!r}, ASKED)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    with TargetDataset(str(tmp_path)) as dataset:
        assert not dataset.index.shards and not dataset.without_index
        dataset.add_shard(documents(*ASKED))
    assert list(check_dataset(Folder(str(tmp_path)))) == []


def test_what_is_no_shard_is_told(tmp_path: Path) -> None:
    fill(str(tmp_path), ASKED[:2])
    written = io.BytesIO()
    import pyarrow as pa

    pq.write_table(pa.table({"x": [1]}), written)
    (tmp_path / "shards" / "targets-0.parquet").write_bytes(written.getvalue())
    with pytest.raises(ValueError, match="does not contain a teacher's targets"):
        merge_dataset(Folder(str(tmp_path)))


def left_behind(folder: Path, name: str, age_s: float) -> Path:
    """A file as a writer that was killed leaves it."""
    left = folder / f".{name}.{uuid.uuid4().hex}"
    left.write_bytes(b"half of it")
    os.utime(left, (left.stat().st_atime, left.stat().st_mtime - age_s))
    return left


def test_what_killed_fillers_left_is_told_and_removed_when_it_is_old(tmp_path: Path) -> None:
    fill(str(tmp_path), ASKED[:4])
    places = (tmp_path, tmp_path / "shards", tmp_path / "index")
    old = [left_behind(place, "targets-1", 2 * QUIET_S) for place in places]
    fresh = [left_behind(place, "targets-2", QUIET_S / 2) for place in places]
    strange = tmp_path / "index" / ".DS_Store"
    strange.write_bytes(b"")
    os.utime(strange, (0, 0))
    folder = Folder(str(tmp_path))
    assert unfinished_files(folder) == sorted_by_place(tmp_path, old + fresh)
    assert list(check_dataset(folder)) == []
    with TargetDataset(str(tmp_path), readonly=True) as dataset:
        assert all(holds(dataset, one) for one in ASKED[:4])
    assert all(path.exists() for path in old), "who only reads removes nothing"
    fill(str(tmp_path), ASKED[4:])
    assert not any(path.exists() for path in old) and all(path.exists() for path in (*fresh, strange))
    assert unfinished_files(folder) == sorted_by_place(tmp_path, fresh) and remove_unfinished(folder) == []


def sorted_by_place(root: Path, paths: list[Path]) -> list[str]:
    """The dataset's own folder first, then shards, then indexes."""
    names = [str(path.relative_to(root)) for path in paths]
    return [name for below in (".", "shards", "index") for name in sorted(names) if name.startswith(below)]


def test_a_writer_whose_file_is_taken_for_a_dead_ones_writes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped for longer than any writer takes, and another fill began meanwhile."""
    folder = Folder(str(tmp_path), sleep=lambda seconds: None)
    move, removed = folder.fs.mv, []

    def move_late(part: str, path: str) -> None:
        if not removed:
            os.utime(part, (0, 0))
            removed.extend(Folder(str(tmp_path)).remove_unfinished("shards"))
        move(part, path)

    monkeypatch.setattr(folder.fs, "mv", move_late)
    folder.write("shards/a.parquet", b"all of it")
    assert len(removed) == 1 and (tmp_path / "shards" / "a.parquet").read_bytes() == b"all of it"
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["a.parquet"]
