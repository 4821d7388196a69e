"""The demo of block diffusion: what it plans, what it takes up again, and the table it makes of what its runs left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demo import diffusion
from demo.comparison import finished
from demo.diffusion import Local, Plan, common, run_settings, steps_in
from demo.diffusion_arms import ABLATIONS, MAIN, THRESHOLDS
from demo.diffusion_table import FIGURES, markdown, results_of, write_results
from demo.measure import Machine
from student_trainer.cli.compose import compose_arguments

MACHINE = Machine("a CPU", 2, "bfloat16", "bfloat16", 2000.0, 500.0, 1500.0, 10.0)


def test_it_makes_as_many_steps_as_there_is_time_for_and_a_few_at_least() -> None:
    steps = steps_in(MAIN, MACHINE, 40 * 60, len(MAIN.runs))
    # One arm asks the teacher; a run starts, evaluates and ends: by hand.
    tokens, evaluated = 256, 2 * 8 * 256 + 2 * 3 * 4 * 24 * 4
    fixed = 6 * (1.12 * (10 + evaluated / 1500) + 12) + 2 * 8 * 256 / 2000 + 10
    assert steps == int((2400 - fixed) / (6 * 1.12 * (tokens / 500 + 0.5 * tokens / 2000)))
    assert steps_in(MAIN, MACHINE, 2 * 40 * 60, 6) > 2 * steps
    assert steps_in(MAIN, MACHINE, 1.0, 6) == diffusion.FEWEST_STEPS


@pytest.mark.parametrize("comparison", [MAIN, ABLATIONS])
def test_every_arm_is_a_run_that_can_be(comparison: Any, tmp_path: Path) -> None:
    """Its settings are understood, differ from the base's as it says, and cost a step the same."""
    plan, made = Plan(7, {}, {}), {}
    for arm, _ in comparison.runs[: len(comparison.arms)]:
        arguments = run_settings(comparison, tmp_path, Local(tmp_path / "teacher"), plan, arm, 1)
        made[arm] = settings = compose_arguments(arguments)
        assert settings.run.steps == 7 and settings.run.seed == 1 and settings.student.architecture == "diffusion"
        views = 2 if settings.student.diffusion.in_two_views else 1
        assert views == comparison.arms[arm].views
        assert settings.data.rows * views == comparison.rows * 2
        assert ("tcs" in settings.distillation.terms) == comparison.arms[arm].asks
        assert settings.data.seq_len % (settings.student.diffusion.block_size or 16) == 0
    assert len({str(settings.model_dump(exclude={"run"})) for settings in made.values()}) == len(made)
    assert {seed for _, seed in comparison.runs} == {0, 1, 2} and comparison.base in comparison.arms
    assert comparison.runs[: len(comparison.arms)] == [(arm, 0) for arm in comparison.arms]
    assert "student=diffusion" in common(comparison, tmp_path)


def line(step: int, **figures: float) -> str:
    other = {name: value * 2 for name, value in figures.items()}
    return json.dumps({"step": step, "prose": figures, "code": other}) + "\n"


def figures_of(cross_entropy: float, perplexity: float) -> dict[str, float]:
    written = {}
    for rate, threshold in zip((3.0, 2.0, 1.0), THRESHOLDS, strict=True):
        written |= {
            f"written_{threshold:g}_tokens_per_pass": rate, f"written_{threshold:g}_perplexity": perplexity * rate,
            f"written_{threshold:g}_entropy": 2.0,
        }  # fmt: skip
    return {"cross_entropy": cross_entropy, "kl": cross_entropy / 2, "agreement": 0.1, "tokens": 100, **written}


def test_the_table_has_means_over_seeds_and_marks_what_no_seed_contradicts(tmp_path: Path) -> None:
    comparison = replace(MAIN, seeds=(0, 1, 2))
    values = {"cross_entropy": (2.0, 2.2, 2.1), "tcs": (1.5, 1.6, 1.9)}
    for arm, seeds in values.items():
        for seed, value in enumerate(seeds):
            run = tmp_path / f"{arm}-{seed}"
            run.mkdir()
            (run / "evaluation.jsonl").write_text(
                line(0, **figures_of(9.0, 99.0)) + line(5, **figures_of(value, 10.0 if arm == "tcs" else 20.0))
            )
            (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    unfinished = tmp_path / "tcs-2" / "evaluation.jsonl"
    assert finished(tmp_path / "tcs-2", 5) and not finished(tmp_path / "tcs-2", 6)
    assert not finished(tmp_path / "nowhere", 5)

    results = results_of(tmp_path, comparison, 5)
    assert results.of("tcs", "cross_entropy") == pytest.approx([1.5 * 1.5, 1.5 * 1.6, 1.5 * 1.9])
    rows = {row[0]: row[1:] for row in results.rows(comparison)}
    assert rows["masked cross-entropy"] == ["3.150 ± 0.150", "2.500 ± 0.312 +"]
    assert rows[FIGURES["written_0.9_perplexity"][0]][0].startswith("28 "), "the geometric mean of the sources"
    # At the perplexity that the base has at 0.9, half as perplexed a student writes three times as fast at most.
    assert results.of("cross_entropy", "equal") == pytest.approx([1.5] * 3)
    assert all(2.9 < rate < 3.1 for rate in results.of("tcs", "equal"))
    text = markdown(results, comparison)
    assert text.splitlines()[0] == "| held out | cross entropy | tcs |" and "2.500 ± 0.312 +" in text

    # A seed that contradicts takes the mark away; a run that is not done is left out.
    unfinished.write_text(line(5, **figures_of(2.15, 10.0)))
    cells = {row[0]: row[2] for row in results_of(tmp_path, comparison, 5).rows(comparison)}
    assert not cells["masked cross-entropy"].endswith("+")
    unfinished.write_text(line(3, **figures_of(2.15, 10.0)))
    assert len(results_of(tmp_path, comparison, 5).of("tcs", "cross_entropy")) == 2

    write_results(tmp_path, comparison, {"steps": 5, "machine": {"cpu": "a CPU"}, "teacher": {}})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["figures"]["tcs"]["0"]["cross_entropy"] == pytest.approx(2.25)
    assert "masked cross-entropy" in (tmp_path / "report.html").read_text()
