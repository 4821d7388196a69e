"""A target store goes to Parquet and comes back bit for bit; what cannot be an answer does not come in."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_proto.requests import KINDS
from teacher_proto.store import TargetStore
from teacher_proto.store_parquet import Packed, export_parquet, import_parquet
from tests.unit.proto.fake_teacher import Replica
from tests.unit.proto.test_store import FINGERPRINT, ask, check, put, truth

ASKED = [ask(kinds=(kind,), seed=n) for n in range(4) for kind in KINDS] + [
    ask(kinds=("hidden",), seed=7, hidden_dtype="bfloat16"),
    ask(kinds=("hidden",), seed=8, hidden_dtype="float16"),
    ask(seed=9, temperatures=()),
    ask(seed=10, rows=(3, 7)),
]
WIDE = ask(kinds=("top_k", "sampled"), vocab=70_000, seed=11)


def fill(path: Path) -> TargetStore:
    store = TargetStore(path, 2**26)
    put(store, *ASKED)
    store.put(FINGERPRINT, WIDE, truth(WIDE, 70_000))
    store.remember(Replica().info)
    return store


@pytest.mark.parametrize("shard_bytes", [2**28, 2000])
def test_a_store_comes_back_bit_for_bit(tmp_path: Path, shard_bytes: int) -> None:
    seen: list[None] = []
    with fill(tmp_path / "one") as one, TargetStore(tmp_path / "two", 2**26) as two:
        number = one.stats().entries
        packed = export_parquet(one, tmp_path / "files", shard_bytes=shard_bytes, on_entry=lambda: seen.append(None))
        files = sorted(path.name for path in (tmp_path / "files").iterdir())
        assert packed == Packed(number, len(files)) and len(seen) == number
        assert files[0] == "targets-00000.parquet" and (len(files) > 1) == (shard_bytes == 2000)
        assert import_parquet(tmp_path / "files", two) == Packed(number, len(files))
        assert two.stats().entries == number and two.teachers() == one.teachers() == [Replica().info]
        for asked in ASKED:
            check(two, asked)
        check(two, WIDE, 70_000)


def test_files_can_be_read_without_us(tmp_path: Path) -> None:
    with fill(tmp_path / "store") as store:
        export_parquet(store, tmp_path / "files")
    table = pq.read_table(tmp_path / "files", filters=[("kind", "==", "top_k"), ("wide_ids", "==", False)])
    for row in table.to_pylist():
        rows = row["stop"] - row["start"]
        assert len(row["ids"]) == len(row["logprobs"]) == rows * row["top_k"]
        assert len(row["log_z"]) == rows * len(row["temperatures"])
        assert len(row["lse"]) == rows and row["hidden"] is None


def test_what_is_there_is_not_written_over_and_what_is_not_ours_is_told(tmp_path: Path) -> None:
    with fill(tmp_path / "store") as store:
        export_parquet(store, tmp_path / "files")
        with pytest.raises(ValueError, match=r"targets-00000.parquet is there already"):
            export_parquet(store, tmp_path / "files")
        with pytest.raises(ValueError, match="there are no Parquet files"):
            import_parquet(tmp_path / "nothing", store)
        (tmp_path / "text.parquet").write_text("hello")
        with pytest.raises(ValueError, match="is not a Parquet file"):
            import_parquet(tmp_path / "text.parquet", store)
        pq.write_table(pa.table({"kind": ["top_k"]}), tmp_path / "other.parquet")
        with pytest.raises(ValueError, match="does not hold 'stillhouse targets 1'"):
            import_parquet(tmp_path / "other.parquet", store)


SPOILT = {
    "kind": ["nonsense", None],
    "start": [-1, 12, None],
    "stop": [0, 3, 100],
    "top_k": [3],
    "tokens": [[1, 2], None],
    "temperatures": [[1.0, 2.0], [5.0, 2.0, 1.0], None],
    "ids": [[1] * 96, [2] * 5, None],
    "logprobs": [[0.5] * 96, None],
    "lse": [[float("nan")] * 12],
    "hidden": [b"123"],
}


@pytest.mark.parametrize(("column", "value"), [(c, v) for c, values in SPOILT.items() for v in values], ids=str)
def test_a_row_that_cannot_be_an_answer_is_left_out(tmp_path: Path, column: str, value: object) -> None:
    with TargetStore(tmp_path / "one", 2**24) as one:
        put(one, ask(seed=0), ask(seed=1))
        export_parquet(one, tmp_path / "files")
    path = next((tmp_path / "files").iterdir())
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    values = pa.array([value, table[column].to_pylist()[1]], type=table.schema.field(at).type)
    pq.write_table(table.set_column(at, table.schema.field(at), values), path)
    with TargetStore(tmp_path / "two", 2**24) as two:
        assert import_parquet(path, two) == Packed(1, 1, left_out=1)
        assert two.stats().entries == 1
