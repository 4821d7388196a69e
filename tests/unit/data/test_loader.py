"""`BatchSource`: pure, exact on resume, the same on any number of ranks, and clear about data that changed."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from student_trainer.data.documents import is_held_out
from student_trainer.data.mixture import MixtureState
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import counts_by_source, inline, opened, pieces, run, same, texts


def two_sources(**changes: object) -> DataSettings:
    sources = {"a": inline(texts(50, longest=90), weight=3), "b": inline(texts(30, seed=1, longest=10), weight=1)}
    return DataSettings(
        **{"sources": sources, "seq_len": 48, "rows": 4, "packing_window": 5, "interleave": 4, **changes}
    )


@pytest.mark.parametrize("packing", ["best_fit", "wrapped", "none"])
def test_the_same_state_gives_the_same_batch_in_any_order_and_process(packing: str) -> None:
    settings = two_sources(packing=packing)
    with opened(settings) as source:
        batches, states = run(source, 40)
        for number in (17, 3, 39, 0, 38, 4):
            again, after = source.batch(states[number], number)
            assert same(again, batches[number]) and after == states[number + 1]
    with opened(settings.model_copy(update={"workers": 1, "batches_ahead": 1})) as other:
        restored = MixtureState.from_json(json.loads(json.dumps(states[25].to_json())))
        for batch, expected in zip(run(other, 15, restored)[0], batches[25:], strict=True):
            assert same(batch, expected)


def test_another_seed_gives_other_batches() -> None:
    with opened(two_sources(), seed=0) as a, opened(two_sources(), seed=1) as b:
        assert not np.array_equal(run(a, 1)[0][0].tokens_BT, run(b, 1)[0][0].tokens_BT)


def test_epochs_come_in_different_orders() -> None:
    with opened(DataSettings(sources={"a": inline(texts(40, longest=3))}, seq_len=64, rows=2)) as source:
        batches, _ = run(source, 30)
    order = [d.key for b in batches for d in b.documents]
    first, second = order[:30], order[40:70]
    assert len(set(first)) == 30 and first != second


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_together_have_the_batch_of_one(world: int) -> None:
    with opened(two_sources()) as whole:
        expected, _ = run(whole, 6)
    parts = []
    for rank in range(world):
        with opened(two_sources(), rank=rank, world=world) as source:
            parts.append(run(source, 6)[0])
    for number, batch in enumerate(expected):
        for name in ("tokens_BT", "position_ids_BT", "document_ids_BT", "loss_mask_BT", "source_ids_BT"):
            together = np.concatenate([getattr(part[number], name) for part in parts])
            assert np.array_equal(together, getattr(batch, name))
        assert [d.key for part in parts for d in part[number].documents] == [d.key for d in batch.documents]


@pytest.mark.parametrize(("rank", "world"), [(0, 3), (2, 2), (-1, 2)])
def test_rows_that_do_not_divide_are_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="rows must divide"), opened(two_sources(), rank=rank, world=world):
        pass


def test_the_mixture_holds_its_weights_in_tokens() -> None:
    with opened(two_sources()) as source:
        batches, states = run(source, 100)
    counts = counts_by_source(batches)
    drawn = {s.name: s.tokens for s in states[-1].sources}
    total = sum(drawn.values())
    assert abs(drawn["a"] - 0.75 * total) <= 2 * 48
    assert abs(counts["a"] - 0.75 * sum(counts.values())) <= (2 + 5) * 48  # what waits for a row is drawn already


def test_weights_changed_between_steps_change_the_next_batches() -> None:
    with opened(two_sources()) as source:
        _, states = run(source, 10)
        changed = states[-1].with_weights({"a": 0, "b": 1})
        batches, _ = run(source, 30, changed)
        assert set(counts_by_source(batches[10:])) == {"a", "b"} and counts_by_source(batches[10:])["a"] == 0
        assert changed.number == 10 and source.batch(changed, 10)[1].weights == {"a": 0.0, "b": 1.0}


def test_held_out_documents_are_never_trained_on_and_do_not_move() -> None:
    documents = texts(200, longest=20)
    sources = {"a": inline(documents, held_out_fraction=0.2)}
    settings = DataSettings(sources=sources, seq_len=64, rows=4, held_out_rows=100)
    held = {f"a:{i}" for i, text in enumerate(documents) if is_held_out(text, 0.2)}
    assert 20 <= len(held) <= 60
    with opened(settings, seed=0) as source, opened(settings, seed=9) as other:
        assert set(pieces(source.held_out("a"))) == held
        assert all(same(x, y) for x, y in zip(source.held_out("a"), other.held_out("a"), strict=True))
        assert set(pieces(run(source, 60)[0])) == {f"a:{i}" for i in range(200)} - held


def test_a_larger_fraction_only_adds_to_what_is_held_out() -> None:
    documents = texts(500)
    kept = [{t for t in documents if is_held_out(t, fraction)} for fraction in (0, 0.05, 0.2, 0.5, 1)]
    assert not kept[0] and len(kept[-1]) == 500
    assert all(small <= large for small, large in pairwise(kept))


def test_held_out_rows_see_many_documents_before_they_see_one_twice() -> None:
    documents = [f"{i} " + "still " * 400 for i in range(60)]
    sources = {"a": inline(documents, held_out_fraction=0.5)}
    with opened(DataSettings(sources=sources, seq_len=64, rows=4, held_out_rows=8)) as source:
        batches = source.held_out("a")
        assert len(batches) == 2 and all(b.tokens_BT.shape == (4, 64) for b in batches)
        assert len(pieces(batches)) == 8


def test_held_out_of_a_source_that_gives_nothing_back() -> None:
    sources = {"a": inline(texts(5)), "b": inline(["one", "two"], held_out_fraction=1e-9)}
    with opened(DataSettings(sources=sources, seq_len=64, rows=1)) as source:
        assert source.held_out("a") == []
        with pytest.raises(ValueError, match="'b' has no held-out document"):
            source.held_out("b")
        with pytest.raises(ValueError, match="no source 'c'"):
            source.held_out("c")


def test_an_evaluation_source_is_held_out_whole_and_never_trained_on() -> None:
    sources = {"a": inline(texts(20)), "eval": inline(texts(5, seed=3), weight=0, held_out_fraction=1)}
    with opened(DataSettings(sources=sources, seq_len=64, rows=2, held_out_rows=50)) as source:
        assert len(pieces(source.held_out("eval"))) == 5
        assert counts_by_source(run(source, 20)[0])["eval"] == 0


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def written(lines: list[str]) -> DataSettings:
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        sources = {"a": SourceSettings(kind="jsonl", path=str(path), held_out_fraction=0)}
        return DataSettings(sources=sources, seq_len=32, rows=2, interleave=4, cache_folder=str(tmp_path / "cache"))

    with opened(written(texts(20))) as source:
        _, states = run(source, 3)
    for changed in (texts(21), texts(20, seed=1)):
        with opened(written(changed)) as source, pytest.raises(ValueError, match="has changed since the run began"):
            source.batch(states[-1], 3)
    moved = written(texts(20)).model_copy(update={"cache_folder": str(tmp_path / "elsewhere")})
    with opened(moved) as source:
        source.check_state(states[-1])
    with (
        opened(moved.model_copy(update={"interleave": 5})) as source,
        pytest.raises(ValueError, match="interleave was 4"),
    ):
        source.check_state(states[-1])
    with opened(two_sources()) as source, pytest.raises(ValueError, match="has the sources"):
        source.check_state(states[-1])


def test_a_batch_must_be_asked_for_with_the_state_before_it() -> None:
    with opened(two_sources()) as source, pytest.raises(ValueError, match="batch 3 was requested"):
        source.batch(source.initial_state(), 3)


def test_a_source_without_training_documents_says_so() -> None:
    sources = {"a": inline(["", "", ""])}
    settings = DataSettings(sources=sources, seq_len=32, rows=1)
    with opened(settings) as source, pytest.raises(ValueError, match="no document to train on"):
        run(source, 1)
    with pytest.raises(ValueError, match=r"data\.sources is empty"), opened(DataSettings()):
        pass


def test_empty_documents_are_passed_over() -> None:
    documents = ["", "first", "", "", "second", ""]
    with opened(DataSettings(sources={"a": inline(documents)}, seq_len=32, rows=1)) as source:
        assert set(pieces(run(source, 3)[0])) == {"a:1", "a:4"}
