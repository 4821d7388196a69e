"""The benchmark of mixtures, without its runs: texts are cut whole, shares add up, the table says who was best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import mixture, mixture_data, mixture_results


def test_pieces_are_the_text_and_end_at_white_space() -> None:
    text = "a line of some words\nand another " * 60
    cut = list(mixture_data.pieces(text))
    assert " ".join(" ".join(cut).split()) == " ".join(text.split())
    assert all(len(piece) <= mixture_data.PIECE for piece in cut)
    assert [len(piece) for piece in mixture_data.pieces("x" * (mixture_data.PIECE + 1))] == [mixture_data.PIECE, 1]


def test_shares_of_every_fixed_mixture_add_up() -> None:
    for name, weights in {**mixture.fixed_mixtures(), "equal": mixture.equal()}.items():
        assert sum(weights.values()) == pytest.approx(1), name
        assert set(weights) <= set(mixture_data.DOMAINS) and min(weights.values()) >= 0


def test_the_search_is_by_the_probe_and_the_table_by_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_results, "RESULTS", tmp_path / "results.jsonl")
    sizes = dict.fromkeys(mixture_data.DOMAINS, 1)

    def line(arm: str, seed: int, test: float, probe: float = 0.0) -> None:
        figures = {
            split: {domain: {"kl": kl, "cross_entropy": 2 * kl} for domain in mixture_data.DOMAINS}
            for split, kl in (("test", test), ("probe", probe))
        }
        with mixture_results.RESULTS.open("a") as file:
            file.write(json.dumps({**figures, "arm": arm, "seed": seed, "shares": {"code": 1.0}}) + "\n")

    first = list(mixture.missing(sizes))[0:1]
    assert first == [("fixed: equal", mixture_results.SEARCH_SEED)]
    for number, name in enumerate(["equal", *mixture.fixed_mixtures()]):
        line(f"fixed: {name}", mixture_results.SEARCH_SEED, test=0.0, probe=0.5 + (name != "no code") * (1 + number))
    assert mixture_results.best_fixed("all") == "no code"
    left = list(mixture.missing(sizes))
    assert ("fixed: no code", 0) in left and all(seed in mixture_results.SEEDS for _, seed in left)
    for seed in (0, 1):
        line("fixed: equal", seed, 1.0 + seed)
        line("excess", seed, 0.9 + seed)
        line("influence: movies", seed, 0.5)
    rows = mixture_results.table("all")
    assert [row["arm"] for row in rows] == ["excess", "fixed: equal"], "arms for another probe are left out"
    assert rows[0]["KL less that of equal shares"] == "-0.100 ± 0.000" and rows[0]["KL"] == "1.400 ± 0.707"
    assert rows[0]["largest share"] == "code 100%"
    assert mixture_results.table("movies")[0]["arm"] == "influence: movies"
