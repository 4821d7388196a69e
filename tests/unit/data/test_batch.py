"""The batch record: borders, padding, positions and the loss mask, against a token-by-token reading of the rules."""

import numpy as np
import pytest

from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.settings.data import DataSettings
from tests.unit.data.making import inline, opened, run, texts


def sequence(ids: list[int], counts: list[bool] | None = None, source: int = 0) -> Placed:
    return Placed(source, f"s{source}:{ids[0]}", np.array(ids, np.int32), None if counts is None else np.array(counts))


def test_a_small_batch_by_hand() -> None:
    rows = [[sequence([5, 6, 7]), sequence([8], source=1), sequence([9, 10])], []]
    batch = build_batch(4, rows, 8, 99, ("a", "b"))
    assert batch.number == 4
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 8, 9, 10, 99, 99], [99] * 8]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 0, 1, 0, 0], [0] * 8]
    assert batch.document_ids_BT.tolist() == [[0, 0, 0, 1, 2, 2, -1, -1], [-1] * 8]
    assert batch.loss_mask_BT.astype(int).tolist() == [[1, 1, 0, 0, 1, 0, 0, 0], [0] * 8]
    assert batch.source_ids_BT.tolist() == [[0, 0, 0, 1, 0, 0, -1, -1], [-1] * 8]
    assert [(d.row, d.start, d.stop, d.source) for d in batch.documents] == [
        (0, 0, 3, "a"),
        (0, 3, 4, "b"),
        (0, 4, 6, "a"),
    ]
    assert batch.fill_rate == 6 / 16


def test_a_row_counts_where_the_token_after_it_counts() -> None:
    batch = build_batch(0, [[sequence([1, 2, 3, 4], [True, False, True, True]), sequence([5, 6])]], 6, 0, ("a",))
    assert batch.loss_mask_BT.astype(int).tolist() == [[0, 1, 1, 0, 1, 0]]


def check(batch: Batch, pad: int) -> None:
    """Every promise of the record, place by place."""
    held = {(d.row, t): i for i, d in enumerate(batch.documents) for t in range(d.start, d.stop)}
    rows, length = batch.tokens_BT.shape
    for row in range(rows):
        ordinals: list[int] = []
        for t in range(length):
            here, after = held.get((row, t)), held.get((row, t + 1))
            if here is None:
                assert batch.tokens_BT[row, t] == pad and batch.document_ids_BT[row, t] == -1
                assert batch.position_ids_BT[row, t] == 0 and batch.source_ids_BT[row, t] == -1
            else:
                document = batch.documents[here]
                if here not in ordinals:
                    ordinals.append(here)
                assert batch.document_ids_BT[row, t] == len(ordinals) - 1
                assert batch.position_ids_BT[row, t] == t - document.start
                assert batch.source_names[batch.source_ids_BT[row, t]] == document.source
            assert batch.loss_mask_BT[row, t] == (here is not None and here == after)
    assert len(held) == sum(d.stop - d.start for d in batch.documents), "documents overlap"


@pytest.mark.parametrize("packing", ["best_fit", "wrapped", "none"])
@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_every_batch_keeps_every_promise(packing: str, add_bos: bool, add_eos: bool) -> None:
    settings = DataSettings(
        sources={"a": inline(texts(40)), "b": inline(texts(20, seed=1, longest=5), weight=0.3)},
        seq_len=37,
        rows=3,
        packing=packing,
        add_bos=add_bos,
        add_eos=add_eos,
    )
    with opened(settings) as source:
        for batch in run(source, 15)[0]:
            check(batch, pad=1)
            for document in batch.documents:
                tokens_T = batch.tokens_BT[document.row, document.start : document.stop]
                assert (tokens_T[0] == 0) == add_bos  # each sequence by itself, pieces too
                assert 0 not in tokens_T[1:]
                if not add_eos:
                    assert 1 not in tokens_T
                elif document.key.count(":") == 1:
                    assert tokens_T[-1] == 1 and 1 not in tokens_T[:-1]


def test_rows_of_a_batch_keep_their_documents() -> None:
    with opened(DataSettings(sources={"a": inline(texts(40))}, seq_len=64, rows=4)) as source:
        batch = run(source, 1)[0][0]
    part = batch.rows(1, 3)
    check(part, pad=1)
    assert np.array_equal(part.tokens_BT, batch.tokens_BT[1:3])
    assert [d.key for d in part.documents] == [d.key for d in batch.documents if d.row in (1, 2)]
