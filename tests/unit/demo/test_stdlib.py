"""The two corpora that every Python has."""

import json
from pathlib import Path

from demo.stdlib import write_stdlib
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import counts_by_source, opened, run


def test_prose_and_code_are_written_and_make_batches(tmp_path: Path) -> None:
    paths = write_stdlib(tmp_path / "corpora")
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    assert rows.keys() == {"prose", "code"}
    assert len(rows["prose"]) > 50 and len(rows["code"]) > 300
    assert any(row["id"] == "json/decoder.py" and "class JSONDecoder" in row["text"] for row in rows["code"])
    assert not any("test" in Path(row["id"]).parts for row in rows["code"])
    sources = {
        name: SourceSettings(kind="jsonl", path=str(path), held_out_fraction=0.1) for name, path in paths.items()
    }
    settings = DataSettings(sources=sources, seq_len=256, rows=4, held_out_rows=4, cache_folder=str(tmp_path / "cache"))
    with opened(settings) as source:
        counts = counts_by_source(run(source, 20)[0])
        assert abs(counts["prose"] - counts["code"]) <= (2 + settings.packing_window) * 256
        assert all(source.held_out(name) for name in ("prose", "code"))
