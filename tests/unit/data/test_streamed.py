"""Streams: every document once an epoch, exact resume at any place, and connections that break."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from student_trainer.data import streamed
from student_trainer.data.content import Content
from student_trainer.data.mixture import MixtureState
from student_trainer.data.streamed import StreamedSource
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import opened, pieces, run, same, texts

CONTENT = Content(0, (), "files")


def shards(tmp_path: Path, kind: str, sizes: tuple[int, ...] = (150, 0, 64, 333)) -> list[str]:
    """Files of so many documents each."""
    documents, paths = iter(texts(sum(sizes), longest=12)), []
    for i, size in enumerate(sizes):
        path = tmp_path / f"{i}.{kind}"
        part = list(islice(documents, size))
        if kind == "parquet":
            pa.parquet.write_table(pa.table({"text": pa.array(part, pa.string())}), path, row_group_size=40)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        paths.append(str(path))
    return paths


def settings(tmp_path: Path, kind: str, **changes: Any) -> DataSettings:
    source = {"kind": kind, "streaming": True, "held_out_fraction": 0.1, **changes}
    shape = {"seq_len": 64, "rows": 4, "held_out_rows": 200, "packing_window": 5, "interleave": 3}
    return DataSettings(sources={"s": SourceSettings(path=shards(tmp_path, kind), **source)}, **shape)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("order", [{"shuffle_window": 100}, {"shuffle": False}])
def test_a_run_resumes_at_any_place_of_a_stream(tmp_path: Path, kind: str, order: dict[str, Any]) -> None:
    with opened(settings(tmp_path, kind, **order)) as source:
        batches, states = run(source, 110)
        assert states[-1].sources[0].cursor.epoch >= 1
        held = set(pieces(source.held_out("s")))
    seen = set(pieces(batches))
    assert not held & seen and len(held | seen) == 150 + 64 + 333
    for start in (1, 30, 61, 99):
        state = MixtureState.from_json(json.loads(json.dumps(states[start].to_json())))
        with opened(settings(tmp_path, kind, **order)) as source:
            for batch, expected in zip(run(source, 8, state)[0], batches[start:], strict=False):
                assert same(batch, expected)


def test_documents_are_shuffled_within_windows_and_shards_among_one_another(tmp_path: Path) -> None:
    source = SourceSettings(kind="jsonl", path=shards(tmp_path, "jsonl"), streaming=True, shuffle_window=128)
    made = StreamedSource("s", source, *streamed.open_shards("s", source, str(tmp_path / "cache")), seed=0)
    orders = []
    for epoch in range(4):
        names = [d.index for shard in range(4) for block in range(7) for d in made.read(epoch, shard, block)]
        assert sorted(names) == sorted(f"{s}/{i}" for s, n in enumerate((150, 0, 64, 333)) for i in range(n))
        orders.append(names)
        places = [int(name.split("/")[1]) for name in names if name.startswith("3/")]
        assert places != sorted(places)
        assert all(place // 128 == i // 128 for i, place in enumerate(places))
    assert len({tuple(dict.fromkeys(name.split("/")[0] for name in order)) for order in orders}) > 1
    assert len({tuple(order) for order in orders}) == 4


def test_seeking_in_parquet_reads_the_row_groups_from_there_on_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceSettings(kind="parquet", path=shards(tmp_path, "parquet", (1000,)), streaming=True)
    groups: list[list[int]] = []
    whole = pa.parquet.ParquetFile.iter_batches

    def counted(self: Any, rows: int, row_groups: list[int], columns: list[str]) -> Any:
        groups.append(row_groups)
        return whole(self, rows, row_groups, columns)

    monkeypatch.setattr(pa.parquet.ParquetFile, "iter_batches", counted)
    assert len(list(streamed.open_shards("s", source, str(tmp_path / "cache"))[0][0](955))) == 45
    assert groups == [[23], [24]]


class Broken:
    """A shard whose connection breaks after some documents, a number of times."""

    def __init__(self, count: int, breaks: int, error: Exception) -> None:
        self.count, self.breaks, self.error = count, breaks, error

    def __call__(self, start: int) -> Iterator[str]:
        for i in range(start, self.count):
            if i % 50 == 49 and self.breaks:
                self.breaks -= 1
                raise ValueError("cannot read") from self.error
            yield f"document {i}"


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), TimeoutError("late"), OSError(5, "I/O error")])
def test_a_connection_that_breaks_is_opened_again_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(streamed, "time", SimpleNamespace(sleep=waits.append))
    source = SourceSettings(kind="hub", name="x", streaming=True, shuffle_window=64)
    made = StreamedSource("s", source, [Broken(200, 4, error)], CONTENT, seed=0)
    names = sorted(int(d.index.split("/")[1]) for block in range(4) for d in made.read(0, 0, block))
    assert names == list(range(200)) and waits == [2, 4, 8, 16]
    with pytest.raises(ValueError, match="cannot read"):
        StreamedSource("s", source, [Broken(200, 9, error)], CONTENT, seed=0).read(0, 0, 0)


def test_what_will_not_pass_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(streamed, "time", SimpleNamespace(sleep=waits.append))
    source = SourceSettings(kind="hub", name="x", streaming=True)
    for error in (FileNotFoundError("no"), EOFError("short"), PermissionError("no")):
        with pytest.raises(ValueError, match="cannot read"):
            StreamedSource("s", source, [Broken(200, 1, error)], CONTENT, seed=0).read(0, 0, 0)
    assert waits == []


def test_a_stream_without_documents_is_refused(tmp_path: Path) -> None:
    source = SourceSettings(kind="jsonl", path=shards(tmp_path, "jsonl", (0, 0)), streaming=True)
    with pytest.raises(ValueError, match="holds no documents"):
        StreamedSource("s", source, *streamed.open_shards("s", source, str(tmp_path / "cache")), seed=0)
