"""A target store goes to Parquet and comes back bit for bit; what cannot be an answer does not come in."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_proto.info import TeacherInfo
from teacher_proto.requests import KINDS, Query
from teacher_proto.store.parquet import SEALED, Packed, export_parquet
from teacher_proto.store.parquet_read import import_parquet
from teacher_proto.store.target_store import TargetStore
from tests.unit.proto.fake_teacher import Replica, same_bits
from tests.unit.proto.test_store import VOCAB, ask, truth

ASKED = [ask(kinds=(kind,), seed=n) for n in range(4) for kind in KINDS] + [
    ask(kinds=("hidden",), seed=7, hidden_dtype="bfloat16"),
    ask(kinds=("hidden",), seed=8, hidden_dtype="float16"),
    ask(seed=9, temperatures=()),
    ask(seed=10, rows=(3, 7)),
]
INFO = Replica().info.model_copy(update={"limits": Replica().info.limits.model_copy(update={"vocab_size": VOCAB})})
FINGERPRINT = INFO.fingerprint
WIDE = ask(kinds=("top_k", "sampled"), vocab=70_000, seed=11)


def put(store: TargetStore, *asked: Query) -> None:
    for one in asked:
        store.put(FINGERPRINT, one, truth(one))


def check(store: TargetStore, asked: Query, vocab: int = VOCAB) -> None:
    answer = store.get(FINGERPRINT, asked)
    assert answer is not None and same_bits(answer, truth(asked, vocab))


def fill(path: Path) -> TargetStore:
    store = TargetStore(path, 2**26)
    put(store, *ASKED)
    store.remember(INFO)
    return store


@pytest.mark.parametrize("shard_bytes", [2**28, 2000])
def test_a_store_comes_back_bit_for_bit(tmp_path: Path, shard_bytes: int) -> None:
    seen: list[None] = []
    wide = other_info(vocab_size=70_000)
    with fill(tmp_path / "one") as one, TargetStore(tmp_path / "two", 2**26) as two:
        one.put(wide.fingerprint, WIDE, truth(WIDE, 70_000))
        one.remember(wide)
        number = one.stats().entries
        packed = export_parquet(one, tmp_path / "files", shard_bytes=shard_bytes, on_entry=lambda: seen.append(None))
        files = sorted(path.name for path in (tmp_path / "files").iterdir())
        assert packed == Packed(number, len(files)) and len(seen) == number
        assert files[0] == "targets-00000.parquet" and (len(files) > 1) == (shard_bytes == 2000)
        assert import_parquet(tmp_path / "files", two) == Packed(number, len(files))
        assert two.stats().entries == number and two.teachers() == one.teachers()
        for asked in ASKED:
            check(two, asked)
        answer = two.get(wide.fingerprint, WIDE)
        assert answer is not None and same_bits(answer, truth(WIDE, 70_000))


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
        with pytest.raises(ValueError, match=r"targets-00000.parquet already exists"):
            export_parquet(store, tmp_path / "files")
        with pytest.raises(ValueError, match="there are no Parquet files"):
            import_parquet(tmp_path / "nothing", store)
        (tmp_path / "text.parquet").write_text("hello")
        with pytest.raises(ValueError, match="is not a Parquet file"):
            import_parquet(tmp_path / "text.parquet", store)
        pq.write_table(pa.table({"kind": ["top_k"]}), tmp_path / "other.parquet")
        with pytest.raises(ValueError, match="does not have the format 'stillhouse targets 1'"):
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
        one.remember(INFO)
        export_parquet(one, tmp_path / "files")
    path = next((tmp_path / "files").iterdir())
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    values = pa.array([value, table[column].to_pylist()[1]], type=table.schema.field(at).type)
    changed = table.set_column(at, table.schema.field(at), values)
    with TargetStore(tmp_path / "none", 2**24) as none:
        pq.write_table(changed, path)
        with pytest.raises(ValueError, match="has changed since it was written"):
            import_parquet(path, none)
        assert none.stats().entries == 0
    # A file that does not say what it held, as those of before did not.
    untold = {key: value for key, value in table.schema.metadata.items() if key != SEALED.encode()}
    pq.write_table(changed.replace_schema_metadata(untold), path)
    with TargetStore(tmp_path / "two", 2**24) as two:
        assert import_parquet(path, two) == Packed(1, 1, left_out=1)
        assert two.stats().entries == 1


def other_info(vocab_size: int = VOCAB) -> TeacherInfo:
    semantic = INFO.identity.semantic.model_copy(update={"dtype": "float16"})
    identity = INFO.identity.model_copy(update={"semantic": semantic})
    limits = INFO.limits.model_copy(update={"vocab_size": vocab_size})
    return INFO.model_copy(update={"identity": identity, "fingerprint": identity.fingerprint, "limits": limits})


def test_rows_of_another_teacher_are_refused_with_the_difference_and_none_comes_in(tmp_path: Path) -> None:
    with fill(tmp_path / "theirs") as theirs:
        export_parquet(theirs, tmp_path / "files", shard_bytes=2000)
    other = other_info()
    with TargetStore(tmp_path / "ours", 2**26) as ours:
        ours.remember(other)
        with pytest.raises(ValueError, match="Nothing was imported") as caught:
            import_parquet(tmp_path / "files", ours)
        said = str(caught.value)
        assert "semantic.dtype" in said and FINGERPRINT in said and other.fingerprint in said
        assert ours.stats().entries == 0 and ours.teachers() == [other]
        # Said to be wanted, they come in as that teacher's, and answer for nobody else.
        assert import_parquet(tmp_path / "files", ours, teacher=FINGERPRINT).entries > 0
        check(ours, ASKED[0])
        assert ours.get(other.fingerprint, ASKED[0]) is None
    with TargetStore(tmp_path / "named", 2**26) as named:
        with pytest.raises(ValueError, match=f"expected {other.fingerprint}"):
            import_parquet(tmp_path / "files", named, teacher=other.fingerprint)
        assert named.stats().entries == 0


@pytest.mark.parametrize("told", [True, False], ids=["sealed", "not sealed"])
@pytest.mark.parametrize("named", [True, False], ids=["as a teacher it names", "as one it does not name"])
def test_rows_put_under_another_fingerprint_are_refused(tmp_path: Path, told: bool, named: bool) -> None:
    """Somebody edits the last file, so that a row answers as our teacher."""
    with fill(tmp_path / "theirs") as theirs:
        if named:
            theirs.remember(other_info())
        export_parquet(theirs, tmp_path / "files", shard_bytes=2000)
    path = sorted((tmp_path / "files").iterdir())[-1]
    table = pq.read_table(path)
    at = table.schema.get_field_index("fingerprint")
    edited = pa.array([other_info().fingerprint, *table["fingerprint"].to_pylist()[1:]])
    table = table.set_column(at, table.schema.field(at), edited)
    if not told:
        kept = {key: value for key, value in table.schema.metadata.items() if key != SEALED.encode()}
        table = table.replace_schema_metadata(kept)
    pq.write_table(table, path)
    with TargetStore(tmp_path / "ours", 2**26) as ours:
        if told or not named:
            with pytest.raises(ValueError, match=r"has changed since it was written|does not describe that teacher"):
                import_parquet(tmp_path / "files", ours)
        ours.remember(INFO)
        with pytest.raises(ValueError, match="othing was imported"):
            import_parquet(tmp_path / "files", ours)
        assert ours.stats().entries == 0


@pytest.mark.parametrize("column", ["logprobs", "lse", "tokens"])
def test_a_changed_number_is_seen(tmp_path: Path, column: str) -> None:
    with TargetStore(tmp_path / "one", 2**24) as one:
        put(one, ask(seed=0), ask(seed=1))
        one.remember(INFO)
        export_parquet(one, tmp_path / "files")
    path = next((tmp_path / "files").iterdir())
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    rows = table[column].to_pylist()
    rows[1][0] = rows[1][0] + 1 if column == "tokens" else rows[1][0] - 0.25
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(rows, table.schema.field(at).type)), path)
    with TargetStore(tmp_path / "two", 2**24) as two:
        with pytest.raises(ValueError, match="has changed since it was written"):
            import_parquet(path, two)
        assert two.stats().entries == 0
