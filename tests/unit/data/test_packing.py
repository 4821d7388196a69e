"""Packing: every token once an epoch, no row overfull, and rows that are nearly full."""

import random

import pytest

from student_trainer.data.packing import OpenRows
from student_trainer.settings.data import DataSettings
from tests.unit.data.making import inline, opened, pieces, run, texts, tokenizer

EOS = 1


def test_best_fit_is_the_tightest_row_of_all() -> None:
    rng = random.Random(0)
    for _ in range(200):
        rows, seq_len = rng.randint(1, 6), 50
        ours, spaces = OpenRows(rows, seq_len), [seq_len] * rows
        for _ in range(30):
            length = rng.randint(1, seq_len)
            fits = [space for space in spaces if space >= length]
            row = ours.place(length)
            if row is None:
                assert not fits
            else:
                assert spaces[row] == min(fits)
                spaces[row] -= length
            assert ours.largest == max(spaces)


@pytest.mark.parametrize("packing", ["best_fit", "wrapped", "none"])
@pytest.mark.parametrize("interleave", [1, 5])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [3, 30])
def test_every_epoch_holds_every_token_exactly_once(packing: str, interleave: int, shuffle: bool, count: int) -> None:
    documents = texts(count, longest=100)
    expected = {
        f"a:{i}": [*tokenizer().encode(text, add_special_tokens=False), EOS] for i, text in enumerate(documents)
    }
    settings = DataSettings(
        sources={"a": inline(documents, shuffle=shuffle)},
        seq_len=48,
        rows=3,
        packing=packing,
        packing_window=4,
        interleave=interleave,
    )
    with opened(settings) as source:
        state, batches = source.initial_state(), []
        while state.sources[0].documents < 3 * count:
            batch, state = source.batch(state, state.number)
            batches.append(batch)
        batches += run(source, 8, state)[0]  # until what waited is placed
    for key, by_offset in pieces(batches).items():
        for epoch in range(3):
            covered = 0
            while covered < len(expected[key]):  # pieces follow one another without gap or overlap
                piece = by_offset[covered].pop(0)
                assert piece == expected[key][covered : covered + len(piece)], (key, epoch)
                covered += len(piece)
    assert pieces(batches).keys() == expected.keys()


def test_rows_are_nearly_full() -> None:
    documents = texts(400, longest=40)
    fill = {}
    for packing in ("best_fit", "wrapped", "none"):
        settings = DataSettings(sources={"a": inline(documents)}, seq_len=256, rows=4, packing=packing)
        with opened(settings) as source:
            batches, _ = run(source, 40)
        fill[packing] = sum(batch.fill_rate for batch in batches) / len(batches)
    assert fill["wrapped"] == 1.0
    assert fill["best_fit"] > 0.97
    assert fill["none"] < 0.5


def test_one_document_longer_than_a_batch_is_cut_every_seq_len_tokens() -> None:
    settings = DataSettings(sources={"a": inline(["still " * 500])}, seq_len=32, rows=2)
    with opened(settings) as source:
        batches, _ = run(source, 3)
    assert [d.key for b in batches for d in b.documents] == [f"a:0:{32 * i}" for i in range(6)]


def test_what_waits_for_a_row_is_never_overtaken_for_ever() -> None:
    """A piece as long as a row waits at most until the next batch, however many short ones there are."""
    documents = ["x " * 200] * 4 + texts(300, longest=3)
    settings = DataSettings(sources={"a": inline(documents)}, seq_len=64, rows=2, packing_window=3)
    with opened(settings) as source:
        state = source.initial_state()
        for number in range(120):
            before = set(state.pending)
            _, state = source.batch(state, number)
            assert len(before & set(state.pending)) <= 1  # two rows take at least two of the three that waited
            assert len(state.pending) <= 3
