"""Every kind of source gives the documents that were written, and one clear message for what cannot be read."""

import bz2
import gzip
import json
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from student_trainer.data.loader import open_source
from student_trainer.data.source import Source
from student_trainer.settings.data import SourceSettings

TEXTS = [f'document {i} – with ümlauts, "quotes" and\na second line' for i in range(300)]
CHATS = [
    [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "a" * (i % 7 + 1)}]
    for i in range(40)
]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(columns: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table(columns), sink, row_group_size=70)
    return sink.getvalue().to_pybytes()


def contents(source: Source) -> list[Any]:
    """All documents of epoch 0, in the order of their names in the source."""
    found = []
    for shard in range(source.shards()):
        block = 0
        while documents := source.read(0, shard, block):
            found += documents
            block += 1
    found.sort(key=lambda d: [int(part) for part in d.index.split("/")])
    assert len({d.index for d in found}) == len(found)
    scanned = [d.index for block_ in source.scan() for d in block_]
    assert sorted(scanned) == sorted(d.index for d in found)
    return [d.content for d in found]


def read(tmp_path: Path, **settings: Any) -> list[Any]:
    return contents(open_source("s", SourceSettings(**settings), 0, str(tmp_path / "cache")))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize(
    ("kind", "compression"), [("parquet", ""), *((kind, c) for kind in ("jsonl", "text") for c in COMPRESSIONS)]
)
def test_files_of_each_kind_compression_and_store(
    tmp_path: Path, kind: str, where: str, compression: str, streaming: bool
) -> None:
    data = {
        "jsonl": jsonl([{"n": i, "text": text} for i, text in enumerate(TEXTS)]),
        "text": "\n\n".join(TEXTS).encode(),
        "parquet": parquet({"text": TEXTS, "n": list(range(300))}),
    }[kind]
    path = f"{'memory://' if where == 'memory' else ''}{tmp_path}/f.{kind}{compression}"
    with fsspec.open(path, "wb") as file:
        file.write(COMPRESSIONS[compression](data))
    settings = {"kind": kind, "path": path, "streaming": streaming}
    if kind == "text":
        settings["document"] = "paragraph"
    assert read(tmp_path, **settings) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_text_by_file_line_and_paragraph(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo\n\nthree\n")
    (folder / "deep" / "b.md").write_bytes("vier\r\nfünf\r\n\r\nsechs".encode())
    (folder / ".hidden").write_text("not this")
    common = {"kind": "text", "path": str(folder), "streaming": streaming}
    assert read(tmp_path, **common) == ["one\ntwo\n\nthree\n", "vier\r\nfünf\r\n\r\nsechs"]
    assert read(tmp_path, **common, document="line") == ["one", "two", "three", "vier", "fünf", "sechs"]
    assert read(tmp_path, **common, document="paragraph") == ["one\ntwo", "three\n", "vier\nfünf", "sechs"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_a_glob_and_a_list_give_the_same_files(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(3):
        (folder / f"part-{i}.jsonl.gz").write_bytes(gzip.compress(jsonl([{"text": t} for t in TEXTS[i::3]])))
    (folder / "README.md").write_text("not data")
    common = {"kind": "jsonl", "streaming": streaming}
    expected = [t for i in range(3) for t in TEXTS[i::3]]
    assert read(tmp_path, **common, path=str(folder)) == expected
    assert read(tmp_path, **common, path=f"{folder}/part-*.jsonl.gz") == expected
    assert read(tmp_path, **common, path=[str(folder / f"part-{i}.jsonl.gz") for i in (2, 0, 1)]) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_and_tokens(tmp_path: Path, kind: str, streaming: bool) -> None:
    ids = [[i, i + 1, 2] for i in range(50)]
    tools = [[{"type": "function", "function": {"name": f"f{i}"}}] for i in range(40)]
    rows = [{"messages": m, "tools": t} for m, t in zip(CHATS, tools, strict=True)]
    chat, tokens = tmp_path / f"chat.{kind}", tmp_path / f"tokens.{kind}"
    if kind == "jsonl":
        chat.write_bytes(jsonl(rows))
        tokens.write_bytes(jsonl([{"ids": row} for row in ids]))
    else:
        chat.write_bytes(parquet({"messages": CHATS, "tools": tools}))
        tokens.write_bytes(parquet({"ids": ids}))
    common = {"kind": kind, "streaming": streaming}
    got = read(tmp_path, **common, path=str(chat), format="chat", tools_column="tools")
    assert got == rows
    assert read(tmp_path, **common, path=str(chat), format="chat") == [{"messages": m} for m in CHATS]
    assert read(tmp_path, **common, path=str(tokens), format="tokens", column="ids") == ids


def test_fields_that_arrow_fills_with_null_do_not_reach_the_template(tmp_path: Path) -> None:
    """Struct columns give every message the union of all fields."""
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]
    plain = [{"role": "user", "content": "hi"}]
    (tmp_path / "c.parquet").write_bytes(parquet({"messages": [plain, calls]}))
    got = read(tmp_path, kind="parquet", path=str(tmp_path / "c.parquet"), format="chat")
    assert got == [{"messages": plain}, {"messages": calls}]


@pytest.mark.parametrize("format", ["text", "chat"])
def test_saved_data_sets(tmp_path: Path, format: str) -> None:
    column, values = ("text", TEXTS) if format == "text" else ("messages", CHATS)
    data = datasets.Dataset.from_dict({column: values, "n": list(range(len(values)))})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(tmp_path / "dict"))
    expected = values if format == "text" else [{"messages": m} for m in values]
    common = {"kind": "arrow", "format": format}
    assert read(tmp_path, **common, path=str(tmp_path / "one")) == expected
    assert read(tmp_path, **common, path=str(tmp_path / "dict")) == expected
    assert read(tmp_path, **common, path=str(tmp_path / "dict"), split="test") == expected[:3]
    with pytest.raises(ValueError, match="no split 'validation', it has test, train"):
        read(tmp_path, **common, path=str(tmp_path / "dict"), split="validation")
    with pytest.raises(ValueError, match="no field 'body', it has"):
        read(tmp_path, **common, path=str(tmp_path / "one"), column="body")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_by_the_code_that_loads_local_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"train-{i}.parquet").write_bytes(parquet({"text": TEXTS[i * 100 : (i + 1) * 100]}))
    common = {"kind": "hub", "name": str(folder), "streaming": streaming}
    assert read(tmp_path, **common) == TEXTS
    with pytest.raises(ValueError, match="cannot load"):
        read(tmp_path, **common, split="nowhere")
    with pytest.raises(ValueError, match="no field 'body', it has 'text'"):
        read(tmp_path, **common, column="body")


def test_a_changed_file_is_indexed_anew_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    settings = {"kind": "jsonl", "path": str(path)}
    path.write_bytes(jsonl([{"text": "one"}]))
    assert read(tmp_path, **settings) == ["one"]
    made = {f: f.stat().st_mtime_ns for f in cache.glob("*.arrow")}
    assert read(tmp_path, **settings) == ["one"]
    assert {f: f.stat().st_mtime_ns for f in cache.glob("*.arrow")} == made
    path.write_bytes(jsonl([{"text": "one"}, {"text": "two"}]))
    assert read(tmp_path, **settings) == ["one", "two"]


@pytest.mark.parametrize("left", [0, 100, 10_000])
def test_an_index_that_was_cut_short_is_made_again(tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": text} for text in TEXTS]))
    assert sorted(read(tmp_path, kind="jsonl", path=str(path))) == sorted(TEXTS)
    (index,) = (tmp_path / "cache").glob("*.arrow")
    data = index.read_bytes()
    assert len(data) > 10_000
    index.write_bytes(data[:left])
    assert sorted(read(tmp_path, kind="jsonl", path=str(path))) == sorted(TEXTS)
    assert "is damaged" in caplog.text and index.read_bytes() == data


def test_lines_of_different_shapes_are_one_source(tmp_path: Path) -> None:
    """Other fields may come, go and change type; they are never looked at."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        jsonl([{"text": "a", "meta": 1}, {"meta": {"x": []}, "text": "b"}, {"text": "c", "meta": "s", "new": [1, "x"]}])
    )
    assert read(tmp_path, kind="jsonl", path=str(path)) == ["a", "b", "c"]


def test_a_document_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.data.files.CHUNK_BYTES", 1000)
    rows = [{"text": "x" * length} for length in (5, 3000, 999, 1, 1000, 20_000, 7)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "a.txt").write_bytes("\n".join(row["text"] for row in rows).encode())
    for streaming in (False, True):
        common = {"streaming": streaming}
        assert read(tmp_path, kind="jsonl", path=str(tmp_path / "a.jsonl"), **common) == [r["text"] for r in rows]
        got = read(tmp_path, kind="text", path=str(tmp_path / "a.txt"), document="line", **common)
        assert got == [r["text"] for r in rows]


BAD_LINES = [
    (b'{"text": "fine"}\n{"text": "cut sho', "line 2: not JSON"),
    (b'{"text": "fine"}\n\n[1, 2]\n', "line 3: got a JSON list, expected an object"),
    (b'{"text": "fine"}\n{"body": "x", "id": 3}\n', "line 2: no field 'text', it has 'body', 'id'"),
    (b'{"text": "fine"}\n{"text": null}\n', "line 2: no field 'text'"),
    (b'{"text": 7}\n', "line 1: 'text' is int, expected a string"),
    (b'{"text": "\\ud800"}\n', "line 1: 'text' contains half a surrogate pair"),
    (b'{"text": "\xff"}\n', "line 1: not JSON"),
    (b"\n \n", "holds no documents"),
    (b"", "holds no documents"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("data", "words"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, data: bytes, words: str, streaming: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read(tmp_path, kind="jsonl", path=str(path), streaming=streaming)
    assert not list(tmp_path.glob("cache/*.arrow")) and not list(tmp_path.glob("cache/*.partial"))


def test_bad_lines_are_left_out_where_the_settings_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\nnot json\n{"text": "b"}\n{"x": 1}\n')
    assert read(tmp_path, kind="jsonl", path=str(path), bad_documents="skip") == ["a", "b"]
    assert "line 2" in caplog.text and "line 4" in caplog.text and "Skipping it" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compression", [c for c in COMPRESSIONS if c])
def test_a_file_that_was_cut_short_is_no_whole_file(tmp_path: Path, compression: str, streaming: bool) -> None:
    data = COMPRESSIONS[compression](jsonl([{"text": f"{i * 7919 % 10007}"} for i in range(9000)]))
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match="is the file complete"):
        read(tmp_path, kind="jsonl", path=str(path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "jsonl", "path": "nowhere.jsonl"}, "no jsonl file at 'nowhere.jsonl'"),
        ({"kind": "text", "path": "*.nothing"}, "no text file at"),
        ({"kind": "parquet", "path": "memory://none/x.parquet"}, "no parquet file at"),
        ({"kind": "jsonl", "path": "nosuch://a/b"}, "Protocol not known|cannot open"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, settings: dict[str, Any], words: str, streaming: bool) -> None:
    with pytest.raises(ValueError, match=words):
        read(tmp_path, **settings, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_parquet_columns_are_named(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet({"body": ["a"], "n": [1], "gap": ["x"], "messages": [[{"role": "user"}]]}))
    common = {"kind": "parquet", "path": str(path), "streaming": streaming}
    with pytest.raises(ValueError, match="no field 'text', it has 'body', 'gap', 'messages', 'n'"):
        read(tmp_path, **common)
    with pytest.raises(ValueError, match="column 'messages' is list"):
        read(tmp_path, **common, column="messages")
    path.write_bytes(parquet({"text": ["a", None]}))
    with pytest.raises(ValueError, match="1 rows have no 'text'"):
        read(tmp_path, **common)
    path.write_bytes(b"this is not parquet at all, whatever it is called")
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet as parquet"):
        read(tmp_path, **common)


def test_a_text_that_is_not_utf8_is_named_and_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt as text: UnicodeDecodeError"):
        read(tmp_path, kind="text", path=str(path))
    assert read(tmp_path, kind="text", path=str(path), encoding_errors="replace") == ["caf�"]


def test_settings_of_other_kinds_are_not_warned_about_when_left_alone(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SourceSettings(kind="jsonl", path="x.jsonl", weight=2)
        SourceSettings(kind="hub", name="x", streaming=True, format="chat")
