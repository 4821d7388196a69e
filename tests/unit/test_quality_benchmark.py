"""The benchmark of what a student keeps, without its runs: arithmetic, resuming, settings, tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quality_codec, quality_losses, quality_sharing, quality_staleness, quality_temperature
from benchmarks.quality_runs import SIZES, common
from benchmarks.quality_targets import k_sums_to_1, left_at_1
from benchmarks.report import publish
from benchmarks.seeded_results import Results, gap_closed, half_interval, interval, paired, spread
from benchmarks.small_models import evenly
from student_trainer.cli.compose import compose_arguments
from teacher_proto.targets import TokenTargets

SMALL = SIZES["small"]
TABLES: tuple[Any, ...] = (quality_losses, quality_temperature, quality_codec, quality_staleness, quality_sharing)


def test_intervals_are_students_and_ratios_go_by_seed() -> None:
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    assert interval([1.0, 2.0, 3.0], 1) == "2.0 [-0.5, 4.5]" and interval([1.5], 1) == "1.5"
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0" and spread([1.5], 2) == "1.50"
    worst, best, arm = {0: 1.0, 1: 3.0, 2: 9.0}, {0: 0.0, 1: 1.0}, {1: 1.5, 0: 0.25}
    assert gap_closed(arm, worst, best) == [75.0, 75.0], "seed 2 has no best"
    assert gap_closed(worst, worst, best) == [0.0, 0.0] and gap_closed(best, worst, best) == [100.0, 100.0]
    assert paired(arm, worst) == [-0.75, -1.5]


def test_what_has_a_line_is_not_made_again_and_time_ends_it(tmp_path: Path) -> None:
    results, made = Results(tmp_path / "results.jsonl"), []
    cells = [{"table": "t", "seed": seed} for seed in range(3)]

    def make(cell: Any) -> dict[str, Any]:
        made.append(cell["seed"])
        if len(made) == 2:
            raise KeyboardInterrupt
        return {"kl": 1 / 3}

    with pytest.raises(KeyboardInterrupt):
        results.make_missing(cells, make, math.inf)
    assert results.make_missing(cells, make, -math.inf) == 2, "the deadline is over: nothing is begun"
    assert results.make_missing(cells, make, math.inf) == 0 and made == [0, 1, 1, 2]
    assert [line["seed"] for line in results.lines({"table": "t"})] == [0, 1, 2]
    assert results.lines({"seed": 1})[0]["kl"] == 0.333333 and not results.lines({"table": "other"})


def test_layers_are_kept_evenly_with_both_ends() -> None:
    assert evenly(6, 4) == [0, 2, 3, 5] and evenly(30, 24)[-1] == 29 and len(evenly(30, 15)) == 15


ARMS = [
    *(("teacher=local", *settings) for _, settings in quality_losses.ARMS.values()),
    *(("teacher=local", *settings) for settings in quality_codec.LOSSES.values()),
    *(("teacher=remote", *settings) for settings in quality_sharing.LOSSES.values()),
    *(
        ("teacher=local", "distillation=logits_only", *quality_staleness._own_text(kind))
        for kind in quality_staleness.DIVERGENCES.values()
    ),
]


@pytest.mark.parametrize("arm", range(len(ARMS)))
def test_every_arm_composes(arm: int) -> None:
    settings = compose_arguments([*common(SMALL, Path("student"), 7), "teacher.model=teacher", *ARMS[arm]])
    assert settings.run.seed == 7 and settings.run.steps * settings.data.rows * settings.data.seq_len >= 100_000 / 2
    assert all(term.coefficient for term in settings.distillation.by_name().values())


def _targets(rows: int = 5) -> TokenTargets:
    generator = np.random.default_rng(0)
    logits_RV = np.sort(generator.normal(size=(rows, 300)) * 3, axis=1)[:, ::-1]
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(1, keepdims=True))
    log_z = np.log(np.exp(logprobs_RV / 2).sum(1, keepdims=True))
    return TokenTargets(
        start=0, ids=np.tile(np.arange(64, dtype=np.uint16), (rows, 1)), lse=np.zeros(rows, np.float32),
        logprobs=logprobs_RV[:, :64].astype(np.float16), next_logprob=np.zeros(rows, np.float32),
        log_z=log_z.astype(np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        (lambda given, t: given, lambda p_RK, mass_R1: p_RK),
        (k_sums_to_1, lambda p_RK, mass_R1: p_RK / mass_R1),
    ],
)
def test_probabilities_of_others_at_a_temperature(
    alter: Callable[[TokenTargets, float], TokenTargets], expected: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    exact, altered = _targets(), alter(_targets(), 2.0)
    p_RK, ours_RK = _at(exact, 2.0), _at(altered, 2.0)
    mass_R1 = p_RK.sum(1, keepdims=True)
    assert (mass_R1 < 0.98).all(), "there is a tail to lose"
    np.testing.assert_allclose(ours_RK, expected(p_RK, mass_R1), rtol=1e-5)
    np.testing.assert_allclose(_at(left_at_1(exact, 2.0), 2.0), np.exp(exact.logprobs.astype(float)), rtol=4e-3)  # type: ignore[union-attr]


def _at(targets: TokenTargets, temperature: float) -> np.ndarray:
    """The probabilities of the K as a loss reads them."""
    assert targets.logprobs is not None and targets.log_z is not None
    return np.exp(targets.logprobs.astype(np.float64) / temperature - targets.log_z)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.NAME)
def test_a_table_is_made_of_the_lines_there_are(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_losses, "_bytes", lambda size, seed: dict.fromkeys(
        (kind for kind, _ in quality_losses.ARMS.values() if kind), 264.0
    ))  # fmt: skip
    figures = (
        "kl", "cross_entropy", "agreement", "own_kl", "own_reverse_kl", "data_kl", "data_reverse_kl", "wall_s",
        "teachers_cpu_s", "passes",
    )  # fmt: skip
    cells = table.cells(SMALL, (0, 1, 2))
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells), "each is another"
    lines = [{**cell, **dict.fromkeys(figures, 1.0 + 0.01 * n + cell["seed"])} for n, cell in enumerate(cells)]
    rows = table.rows(SMALL, lines)
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same columns"
    assert sum(row["seeds"] for row in rows) == len(cells)
    assert table.rows(SMALL, lines[: len(lines) // 2]), "some seeds are enough"


def test_one_table_of_a_page_with_several_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    mark = "<!-- table: {}, written by x -->\n\nold\n\n<!-- end of table -->\n"
    page.write_text(f"# Page\n{mark.format('codec')}between\n{mark.format('staleness')}after\n")
    publish(page, "new", "staleness")
    assert page.read_text().count("old") == 1 and "staleness, written by x -->\n\nnew\n\n<!-- end" in page.read_text()
    with pytest.raises(ValueError, match="2 times"):
        publish(page, "new")
    with pytest.raises(ValueError, match="0 times"):
        publish(page, "new", "sharing")
