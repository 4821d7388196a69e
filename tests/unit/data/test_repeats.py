"""Documents with weights: read as often as their weights say, in an order that follows from seed and epoch alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from student_trainer.data.loader import BatchSource
from student_trainer.data.order import hashed, shuffled
from student_trainer.data.random_access import Repeats
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import opened, run, same, texts, tokenizer


def test_a_weight_is_how_often_a_document_is_read_in_an_epoch() -> None:
    weights = np.array([0.0, 0.25, 1.0, 1.5, 3.0])
    repeats = Repeats(weights, "s", seed=3)
    read: Counter[int] = Counter()
    epochs = 2000
    for epoch in range(epochs):
        order = repeats.documents(epoch, np.arange(repeats.count(epoch)))
        times = np.bincount(order, minlength=5)
        assert (np.floor(weights) <= times).all() and (times <= np.ceil(weights)).all()
        read.update(order.tolist())
    assert read[0] == 0 and read[2] == epochs and read[4] == 3 * epochs
    assert read[1] / epochs == pytest.approx(0.25, abs=0.03) and read[3] / epochs == pytest.approx(1.5, abs=0.03)


def test_an_epoch_is_never_empty() -> None:
    repeats = Repeats(np.array([0.0, 1e-9]), "s", seed=0)
    assert repeats.documents(0, np.arange(repeats.count(0))).tolist() == [1]


def test_chances_are_even_and_their_own_for_each_key() -> None:
    a, b = hashed(20_000, 1), hashed(20_000, 2)
    assert a.min() >= 0 and a.max() < 1 and abs(a.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("weights", [[-1.0, 1.0], [float("nan"), 1.0], [0.0, 0.0]])
def test_weights_that_make_no_sense_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="source 's': the documents' weights range from"):
        Repeats(np.array(weights), "s", seed=0)


def write(folder: Path, kind: str, weights: list[float], documents: list[str]) -> Path:
    table = pa.table({"text": documents, "how_often": pa.array(weights)})
    path = folder / f"weighted.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(table, path, row_group_size=7)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    return path


def settings(tmp_path: Path, path: Path, **changes: Any) -> DataSettings:
    kind = "parquet" if path.suffix == ".parquet" else "arrow"
    source = SourceSettings(
        kind=kind, path=(str(path),), **{"weight_column": "how_often", "held_out_fraction": 0.0, **changes}
    )
    return DataSettings(
        sources={"s": source}, seq_len=512, rows=1, packing="none", workers=1, cache_folder=str(tmp_path / "cache")
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_source_reads_them_by_weight(tmp_path: Path, kind: str) -> None:
    documents = texts(20)
    weights = [float(i % 3) for i in range(20)]
    path = write(tmp_path, kind, weights, documents)
    with opened(settings(tmp_path, path)) as source:
        batches, states = run(source, int(sum(weights)))
        keys = Counter(document.key.split(":")[1] for batch in batches for document in batch.documents)
        assert keys == {str(i): int(w) for i, w in enumerate(weights) if w}
        again, _ = run(source, 3, states[7])
    assert all(same(a, b) for a, b in zip(again, batches[7:10], strict=True)), "a batch follows from its state alone"
    firsts = [batch.documents[0].key for batch in batches]
    assert firsts != sorted(firsts), "they are shuffled, copies and all"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_other_weights_are_other_data(tmp_path: Path, kind: str) -> None:
    fingerprints = []
    for number, weight in enumerate((1.0, 2.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with opened(settings(tmp_path, write(folder, kind, [1.0, weight], ["a b", "c d"]))) as source:
            fingerprints.append(source.initial_state().sources[0].fingerprint)
    assert fingerprints[0] != fingerprints[1]


def test_equal_weights_read_each_document_once(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [1.0] * 9, texts(9))
    orders = []
    for weight_column in ("how_often", None):
        with opened(settings(tmp_path, path, weight_column=weight_column)) as source:
            batches, _ = run(source, 9)
            orders.append([document.key for batch in batches for document in batch.documents])
    assert orders[0] == orders[1] and len(set(orders[0])) == 9
    assert shuffled(np.arange(9), 9, 5).tolist() != list(range(9))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight_column needs an index"):
        SourceSettings(kind="parquet", path=("x",), weight_column="w", streaming=True)
    with pytest.warns(UserWarning, match="`weight_column` has no effect"):
        SourceSettings(kind="jsonl", path=("x",), weight_column="w")
    path = tmp_path / "words.parquet"
    pa.parquet.write_table(pa.table({"text": ["a"], "how_often": ["often"]}), path)
    with pytest.raises(ValueError, match="'how_often' is string, expected numbers"):
        BatchSource(settings(tmp_path, path), tokenizer(), seed=0)
    with pytest.raises(ValueError, match="no field 'often'"):
        BatchSource(settings(tmp_path, path, weight_column="often"), tokenizer(), seed=0)
