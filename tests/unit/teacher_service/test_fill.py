"""Filling a store offline: what a service would answer, once each, and on again after any stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.engine import Job
from teacher_proto.errors import EngineDeadError
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.store.target_store import TargetStore
from teacher_service.engines.scripted import Script, ScriptedEngine
from teacher_service.offline import fill as fill_module
from teacher_service.offline.documents import Cutting, Piece, find_files, read_pieces
from teacher_service.offline.fill import FillReport, fill
from teacher_service.text import Text
from tests.unit.proto.fake_teacher import same_bits

SPEC = TargetSpec(kinds=("top_k",), top_k=8, temperatures=(2.0,))
CUTTING = Cutting(max_length=5, vocab_size=512)
TEXT = Text(None, 512)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TargetStore]:
    with TargetStore(tmp_path / "store", 2**26) as store:
        yield store


def pieces(*numbers: int) -> Iterator[Piece]:
    return iter([Piece(np.arange(n, n + 5), n) for n in numbers])


def query(number: int) -> Query:
    return Query(np.arange(number, number + 5), (0, 5), SPEC)


async def run(store: TargetStore, what: Iterator[Piece], **script: Any) -> tuple[FillReport, ScriptedEngine]:
    engine = ScriptedEngine(Script(**script))
    await engine.start()
    return await fill(engine, store, what, SPEC, window=20), engine


async def test_a_filled_store_holds_what_the_engine_answers_bit_for_bit(store: TargetStore) -> None:
    report, engine = await run(store, pieces(*range(50)))
    assert (report.scored, report.skipped, report.failed, report.lost) == (50, 0, 0, 0) and report.tokens == 250
    assert [info.identity for info in store.teachers()] == [engine.identity]
    for number in range(50):
        stored = store.get(engine.identity.fingerprint, query(number))
        assert stored is not None and same_bits(stored, await engine.score(Job(query(number), "test")))


async def test_what_is_there_and_what_comes_twice_is_scored_once(
    store: TargetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill_module, "_SETTLING", 4)
    await run(store, pieces(*range(20)))
    report, engine = await run(store, pieces(*range(30), *range(30), 3, 29))
    assert engine.jobs_started == report.scored == 10 and report.skipped == 52


async def test_a_sequence_that_the_engine_cannot_bear_costs_only_itself(store: TargetStore) -> None:
    report, engine = await run(store, pieces(*range(0, 60, 6)), poison_token=14)
    assert (report.scored, report.failed) == (9, 1) and "fails on token 14" in report.failures[0]
    assert store.get(engine.identity.fingerprint, query(12)) is None


@pytest.mark.parametrize("corrupt", ["nan", "unsorted", "duplicate_id", "mass"])
async def test_nonsense_is_not_stored(store: TargetStore, corrupt: str) -> None:
    report, _ = await run(store, pieces(1, 2, 3), corrupt=corrupt)
    assert (report.scored, report.failed, store.stats().entries) == (0, 3, 0)


async def test_what_does_not_fit_the_device_together_is_tried_alone(store: TargetStore) -> None:
    report, _ = await run(store, pieces(*range(30)), oom_above_tokens=15, delay_s=0.001)
    assert (report.scored, report.failed, report.failures) == (30, 0, [])


async def test_what_does_not_fit_the_device_alone_fails_alone(store: TargetStore) -> None:
    large = Piece(np.arange(90, 106), 90)
    report, _ = await run(store, iter([*pieces(*range(8)), large]), oom_above_tokens=15, delay_s=0.001)
    assert (report.scored, report.failed) == (8, 1)
    assert "out of memory" in report.failures[0]


async def test_a_dead_engine_ends_the_run_and_loses_nothing(store: TargetStore) -> None:
    with pytest.raises(EngineDeadError):
        await run(store, pieces(*range(0, 60, 5)), die_token=42)
    assert store.stats().entries >= 4
    report, _ = await run(store, pieces(*range(0, 60, 5)))
    assert report.scored + report.skipped == 12 == store.stats().entries


async def test_a_store_that_is_too_small_is_told(tmp_path: Path) -> None:
    with TargetStore(tmp_path / "small", 2**20) as store:
        what = (Piece(np.random.default_rng(n).integers(0, 512, 400), n) for n in range(120))
        report, _ = await run(store, what)
    assert report.scored == 120 and report.lost > 0


def read(data: Path, cutting: Cutting = CUTTING) -> list[list[int]]:
    return [piece.tokens_T.tolist() for piece in read_pieces(find_files(data), TEXT, cutting)]


def test_rows_of_ids_are_cut_to_the_length_of_a_sequence(tmp_path: Path) -> None:
    rows = [[1, 2, 3], list(range(12)), []]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"tokens": row, "id": 7}) for row in rows) + "\n\n")
    pq.write_table(pa.table({"input_ids": rows, "x": [1, 2, 3]}), tmp_path / "b.parquet")
    (tmp_path / "readme.md").write_text("not data")
    expected = [[1, 2, 3], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert read(tmp_path) == expected * 2
    assert read(tmp_path / "b.parquet") == expected


def test_how_far_reading_is_comes_in_bytes(tmp_path: Path) -> None:
    rows = [[n] * 10 for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    pq.write_table(pa.table({"tokens": rows}), tmp_path / "b.parquet")
    files = find_files(tmp_path)
    marks = [piece.bytes_read for piece in read_pieces(files, TEXT, CUTTING)]
    assert marks == sorted(marks) and marks[-1] == sum(path.stat().st_size for path in files)


def test_text_goes_through_the_models_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    text = Text(tiny_llama, 512)
    (tmp_path / "a.txt").write_text("one line\n\nanother line\r\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one line"}))
    got = [piece.tokens_T.tolist() for piece in read_pieces(find_files(tmp_path), text, Cutting(100, 512))]
    assert got == text.encode(["one line", "another line", "one line"], True)


def test_a_text_with_half_a_surrogate_pair_is_named_by_its_place(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n{"text": "a\\ud800b"}')
    with pytest.raises(ValueError, match="line 2: the text holds half a surrogate pair at its character 1"):
        list(read_pieces(find_files(tmp_path), Text(tiny_llama, 512), Cutting(100, 512)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"tokens": [1]}\nnonsense', "line 2: not JSON"),
        ("a.jsonl", "[1, 2]", "line 1: expected a JSON object, got list"),
        ("a.jsonl", '{"words": 1}', "line 1: no field tokens, input_ids or text; it has words"),
        ("a.jsonl", '{"tokens": [1, 512]}', "line 1: got token ids from 1 to 512, expected 0 to 511"),
        ("a.jsonl", '{"tokens": [1, true]}', "expected text or a list of token ids"),
        ("a.jsonl", '{"tokens": 5}', "expected text or a list of token ids"),
        ("a.jsonl", '{"text": "words"}', "no tokenizer.json; expected token ids"),
        ("a.parquet", "nonsense", "not a Parquet file"),
        ("a.csv", "1,2", "expected a file that ends in .jsonl, .parquet, .txt"),
    ],
)
def test_what_is_no_data_is_named_by_its_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        read(tmp_path / name)


def test_no_data_is_told(tmp_path: Path) -> None:
    for data in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(ValueError, match="no data at"):
            find_files(data)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column tokens, input_ids or text; it has x"):
        read(tmp_path / "x.parquet")
