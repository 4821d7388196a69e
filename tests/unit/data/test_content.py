"""Which data a run began with: all are hashed, a change anywhere is seen on resume, and the message says where."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from student_trainer.data import content as contents
from student_trainer.data.content import LEAF, MOST_BLOCKS, Content, ContentHasher
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import opened, run, same

COUNT = 10_000
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHANGED = 7_777  # far from what a sample of some documents would hit


def lines(change: int | None = None) -> list[str]:
    """Texts of one length; the changed one keeps it."""
    texts = [f"document {i:05d} says little" for i in range(COUNT)]
    if change is not None:
        texts[change] = texts[change].replace("little", "nought")
    return texts


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquet(path: Path, texts: list[str]) -> None:
    pa.parquet.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="none")


def write_text(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(texts))


def write_chats(path: Path, texts: list[str]) -> None:
    chats = ([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in texts)
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def write_saved(path: Path, texts: list[str]) -> None:
    datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))}).save_to_disk(str(path))


def write_folder(path: Path, texts: list[str]) -> None:
    path.mkdir(exist_ok=True)
    write_parquet(path / "train-0.parquet", texts[:5000])
    write_parquet(path / "train-1.parquet", texts[5000:])


KINDS: dict[str, tuple[dict[str, Any], Callable[[Path, list[str]], None]]] = {
    "jsonl": ({"kind": "jsonl"}, write_jsonl),
    "jsonl streamed": ({"kind": "jsonl", "streaming": True}, write_jsonl),
    "parquet": ({"kind": "parquet"}, write_parquet),
    "parquet streamed": ({"kind": "parquet", "streaming": True}, write_parquet),
    "text": ({"kind": "text", "document": "line"}, write_text),
    "chats": ({"kind": "jsonl", "format": "chat", "chat_template": TEMPLATE, "loss_on": "all"}, write_chats),
    "arrow": ({"kind": "arrow"}, write_saved),
    "hub": ({"kind": "hub"}, write_folder),
    "hub streamed": ({"kind": "hub", "streaming": True}, write_folder),
}


def settings_for(kind: str, path: Path, tmp_path: Path) -> DataSettings:
    given, _ = KINDS[kind]
    where = {"name": str(path)} if given["kind"] == "hub" else {"path": str(path)}
    shape = {"seq_len": 64, "rows": 2, "interleave": 2, "cache_folder": str(tmp_path / "cache")}
    return DataSettings(sources={"s": SourceSettings(**given, **where)}, **shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("untouched", [False, True], ids=["", "time kept"])
def test_one_changed_line_of_ten_thousand_is_refused_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, untouched: bool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    _, write = KINDS[kind]
    path = tmp_path / "data"
    write(path, lines())
    settings = settings_for(kind, path, tmp_path)
    with opened(settings) as source:
        _, states = run(source, 3)
        known = source.contents()
    times = {file: file.stat() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
    if path.is_dir() and kind == "arrow":
        _edit(next(path.glob("*.arrow")))
    else:
        write(path, lines(CHANGED))
    for file, was in times.items():
        if untouched:
            os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    if kind == "hub" and untouched:
        # The hub's library reads what it has made of a local folder while the times of its files are the same.
        with opened(settings) as source:
            assert source.resumed(states[-1], known) == states[-1]
        return
    with opened(settings) as source, pytest.raises(ValueError, match="has changed since the run began") as caught:
        source.resumed(states[-1], known)
    place = "at least one of documents 7,745 to 7,808 of 10,000 differs"
    if kind.endswith("streamed"):
        place = "1 of its 1 files differ, the first is data"
    if kind == "hub streamed":
        place = "1 of its 2 files differ, the first is train-1.parquet"
    assert place in str(caught.value)


def _edit(file: Path) -> None:
    """As an editor would, in place."""
    data = file.read_bytes()
    was = f"document {CHANGED:05d} says little".encode()
    assert data.count(was) == 1
    file.write_bytes(data.replace(was, was.replace(b"little", b"nought")))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_documents_elsewhere_go_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        KINDS[kind][1](tmp_path / name / "data", lines())
    with opened(settings_for(kind, tmp_path / "here" / "data", tmp_path)) as source:
        batches, states = run(source, 4)
        known = source.contents()
    with opened(settings_for(kind, tmp_path / "there" / "data", tmp_path / "there")) as source:
        state = source.resumed(states[2], known)
        again, _ = source.batch(state, 2)
    assert same(again, batches[2])


def test_how_documents_are_cut_into_tables_does_not_matter() -> None:
    texts = [f"{'ä' * (i % 7)} {i}" for i in range(1000)]
    ids = [list(range(i % 5)) for i in range(1000)]
    for values, kind in ((texts, pa.string()), (ids, pa.list_(pa.int32()))):
        found = set()
        for size in (1, 7, 64, 1000):
            hasher = ContentHasher()
            for start in range(0, 1000, size):
                # Of a longer array, so that it begins within its buffers.
                array = pa.array(values[: start + size], kind).slice(start)
                hasher.add(pa.chunked_array([array]))
            found.add(hasher.finish())
        assert len(found) == 1 and next(iter(found)).count == 1000


def test_where_one_document_ends_and_the_next_begins_is_part_of_the_content() -> None:
    prints = set()
    for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""]):
        hasher = ContentHasher()
        hasher.add(pa.chunked_array([pa.array(texts)]))
        prints.add(hasher.finish().fingerprint)
    assert len(prints) == 4


def test_hashes_are_made_once_and_again_after_an_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    real = contents._hash
    monkeypatch.setattr(
        contents, "_hash", lambda dataset, doing: (hashed.append(len(dataset)), real(dataset, doing))[1]
    )
    write_jsonl(tmp_path / "data", lines())
    settings = settings_for("jsonl", tmp_path / "data", tmp_path)
    prints = []
    for _ in range(3):
        with opened(settings) as source:
            prints.append(source.initial_state().sources[0].fingerprint)
    assert hashed == [], "the index was hashed as it was written"
    # Somebody edits the index itself, and sets its time back.
    [index] = (tmp_path / "cache").glob("*.arrow")
    was = index.stat()
    _edit(index)
    os.utime(index, ns=(was.st_atime_ns, was.st_mtime_ns))
    with opened(settings) as source:
        prints.append(source.initial_state().sources[0].fingerprint)
    assert hashed == [COUNT] and len(set(prints[:3])) == 1 and prints[3] != prints[0]


def test_a_file_that_changes_under_a_stream_is_found_out_when_it_is_opened_again(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data", lines()[:200])
    settings = settings_for("jsonl streamed", tmp_path / "data", tmp_path)
    with opened(settings) as source:
        _, states = run(source, 2)
        (tmp_path / "data.backup").hardlink_to(tmp_path / "data")  # changes nothing of what is in it
        _, states = run(source, 60, states[-1])
        (tmp_path / "data.backup").unlink()
        # At once: the source reads ahead, and must not find a file that is half written.
        write_jsonl(tmp_path / "other", lines()[1:201])
        (tmp_path / "other").replace(tmp_path / "data")
        with pytest.raises(ValueError, match="has changed since the run opened it"):
            run(source, 200, states[-1])


def test_a_state_of_an_older_trainer_is_held_against_the_sample_it_knows(tmp_path: Path) -> None:
    from dataclasses import replace

    write_jsonl(tmp_path / "data", lines())
    with opened(settings_for("jsonl", tmp_path / "data", tmp_path)) as source:
        state = source.initial_state()
        [now] = state.sources
        older = replace(state, sources=(replace(now, fingerprint=now.fingerprint.rpartition(":")[0]),))
        assert source.resumed(older, {}) == state
        other = replace(state, sources=(replace(now, fingerprint="10000 documents:0123456789abcdef"),))
        with pytest.raises(ValueError, match="has changed since the run began"):
            source.resumed(other, {})


def test_what_a_checkpoint_keeps_is_small_and_finds_the_place_among_millions() -> None:
    leaves = tuple(f"{i:016x}" for i in range(10_000_000 // LEAF))
    ours = Content(10_000_000, leaves)
    changed = Content(10_000_000, (*leaves[:100_000], "changed", *leaves[100_001:]))
    kept = ours.to_json()
    assert len(kept["blocks"]) <= MOST_BLOCKS and len(json.dumps(kept)) < 8_000
    said = changed.difference(kept)
    assert "of 10,000,000 differs" in said and "more places" not in said
    shorter = Content(9_999_999, leaves)
    assert "10,000,000 documents before, 9,999,999 documents now" in shorter.difference(kept)


def test_a_store_that_says_nothing_of_the_content_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import fsspec

    with fsspec.open("memory://silent/a.jsonl", "wb") as file:
        file.write(b"".join(b'{"text": "some text"}\n' for _ in range(50)))
    source = SourceSettings(kind="jsonl", path="memory://silent/a.jsonl", streaming=True)
    with caplog.at_level(logging.WARNING), opened(DataSettings(sources={"s": source}, cache_folder=str(tmp_path))):
        pass
    assert "no hash of their content" in caplog.text


def test_indexes_that_killed_processes_had_half_written_are_swept_and_one_that_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    import filelock

    (tmp_path / "cache").mkdir()
    left, busy = tmp_path / "cache" / "0a.123.partial", tmp_path / "cache" / "0b.124.partial"
    left.write_bytes(b"half")
    busy.write_bytes(b"half")
    write_jsonl(tmp_path / "data", lines()[:100])
    with (
        filelock.FileLock(tmp_path / "cache" / "0b.arrow.lock"),
        opened(settings_for("jsonl", tmp_path / "data", tmp_path)),
    ):
        assert busy.exists() and not left.exists()
    write_jsonl(tmp_path / "data", lines()[:101])
    with opened(settings_for("jsonl", tmp_path / "data", tmp_path)):
        assert not busy.exists()


@pytest.mark.parametrize("kind", ["arrow", "jsonl streamed"])
def test_a_cache_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    KINDS[kind][1](tmp_path / "data", lines()[:500])
    (tmp_path / "cache").write_text("a file where the folder should be")
    settings = settings_for(kind, tmp_path / "data", tmp_path)
    with opened(settings) as source:
        state = source.initial_state()
    with opened(settings) as source:
        assert source.resumed(state, {}) == state
    assert "cannot cache the hashes of" in caplog.text
