"""The demo of classes: what it plans, what it chooses by what, what it takes up again, and the table of its runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from demo import classification as demo
from demo.classification import go_on, run_settings
from demo.classification_plan import (
    ARMS,
    EPOCH,
    FEWEST_STEPS,
    LAYERS,
    Plan,
    Run,
    best,
    known_runs,
    make_plan,
    next_run,
    planned,
    share_of_cost,
    steps_in,
)
from demo.classification_table import arm_rows, figures_of, length_rows, lines_of, spread, verdict, write_results
from demo.measure import Machine
from demo.prepare import TEACHER
from demo.served import Teacher
from student_trainer.cli.compose import compose_arguments

PLAN = planned(15, 24, {"cpu": "a CPU"})


def machine(tokens_per_second: float) -> Machine:
    return Machine("a CPU", 2, "bfloat16", "bfloat16", 2000.0, tokens_per_second, 1500.0, 10.0)


def test_a_fast_machine_trains_all_layers_and_a_slow_one_fewer() -> None:
    fast, slow = (make_plan(machine(rate), 2 * 3600, 3, {}) for rate in (30_000.0, 30.0))
    assert fast.layers == LAYERS[0] and fast.steps >= EPOCH / 2 and fast.held_out_rows == 400
    assert slow.layers == LAYERS[-1] and slow.steps == FEWEST_STEPS and slow.held_out_rows < 400
    assert make_plan(machine(3000.0), 2 * 3600, 3, {}).layers in LAYERS
    # By hand: 6 arms by 2 rates, 2 more ways to weigh relations, 2 shorter stages 2; 18 final runs; teacher, stage 2.
    share = (4 + 15) / (4 + 30)
    step_s = 1.12 * share * 1024 / 400
    left = 4 * 3600 - (16 * 10 + 18 * 20) * step_s - (3 + 16 + 18) * (1.12 * 10 + 12) - 10
    assert steps_in(machine(400.0), 4 * 3600, 3, 15, True) == int(left / (step_s * (1 / share + 2 + 8 + 18)))
    # Without a search: one arm after three lengths of stage 2, and the 18.
    left = 4 * 3600 - (3 * 10 + 18 * 20) * step_s - (3 + 3 + 18) * (1.12 * 10 + 12) - 10
    assert steps_in(machine(400.0), 4 * 3600, 3, 15, False) == int(left / (step_s * (1 / share + 2 + 1.5 + 18)))
    assert fast.search and not slow.search
    assert share_of_cost(30) == 1.0


def all_runs(seeds: int, accuracy: dict[str, float]) -> list[Run]:
    return all_runs_of(PLAN, seeds, accuracy)


def all_runs_of(plan: Plan, seeds: int, accuracy: dict[str, float]) -> list[Run]:
    """Made one after another, as the demo makes them; accuracy 0.5 where nothing is said of a run."""
    done: dict[str, dict[str, float]] = {}
    made = []
    while (run := next_run(plan, done, seeds)) is not None:
        assert run.name not in done
        made.append(run)
        done[run.name] = {"accuracy": accuracy.get(run.name, 0.5), "cross_entropy": 0.7}
    return made


def test_every_arm_has_the_same_search_and_the_final_runs_have_what_it_found() -> None:
    found = {"rate-bitnet_sft-0.001": 0.6, "rate-logits-0.002": 0.6, "gamma-both-1e3": 0.7, "length-24": 0.8}
    runs = all_runs(2, found)
    assert {arm: [run.rate for run in runs if run.phase == "rates" and run.arm == arm] for arm in ARMS} == {
        name: list(arm.rates) for name, arm in ARMS.items()
    }
    assert {len(arm.rates) for arm in ARMS.values()} == {2}
    last = [run for run in runs if run.phase == "final"]
    assert [run.name for run in last] == [f"{arm}-{seed}" for seed in range(2) for arm in ARMS]
    by_name = {run.name: run for run in last}
    assert by_name["bitnet_sft-1"].rate == 1e-3 and by_name["logits-1"].rate == 2e-3
    assert by_name["both-0"].gamma == "1e3" and by_name["relations-0"].gamma == "shares"
    assert {run.stage2 for run in last if ARMS[run.arm].stage2} == {24} and by_name["bitnet_sft-0"].stage2 == 0
    assert {run.seed for run in runs if run.phase not in ("final",)} == {0}


def test_without_a_search_every_arm_has_its_first_rate_and_the_longest_stage_2() -> None:
    plan = planned(15, 24, {}, search=False)
    runs = all_runs_of(plan, 2, {})
    assert [run.name for run in runs[:3]] == ["teacher", "stage2-24", "stage2-48"]
    last = [run for run in runs if run.phase == "final"]
    assert [(run.arm, run.seed) for run in last] == [(arm, seed) for seed in range(2) for arm in ARMS]
    assert all(run.rate == ARMS[run.arm].rates[0] for run in last)
    assert {run.stage2 for run in last if ARMS[run.arm].stage2} == {48}
    assert [(run.phase, run.stage2, run.rate) for run in runs[15:]] == [("lengths", n, 1e-3) for n in (0, 24, 48)]


def test_of_equally_accurate_runs_the_surer_one_is_chosen() -> None:
    runs = [Run("rates", name, 1) for name in "ab"]
    same = {"a": {"accuracy": 0.5, "cross_entropy": 0.7}, "b": {"accuracy": 0.5, "cross_entropy": 0.6}}
    assert best(same, runs).name == "b"


def test_every_run_can_be_and_only_final_ones_see_the_test_split() -> None:
    for run in all_runs(1, {}):
        if run.phase in ("rates", "lengths") and run.rate == ARMS[run.arm].rates[1]:
            continue  # as that with the first rate
        settings = compose_arguments(run_settings(PLAN, run))
        assert run.steps % settings.evaluation.every == 0
        assert settings.run.steps == run.steps and settings.run.id == run.name
        if run.phase == "stage2":
            assert set(settings.data.sources) == {"movies", "amazon", "nyt", "tweets"}
            assert all(source.split == "train" for source in settings.data.sources.values())
            continue
        assert settings.data.sources["held_out"].split == ("test" if run.phase == "final" else "validation")
        assert settings.data.sources["movie_reviews"].split == "train"
        if run.phase == "teacher":
            continue
        arm = ARMS[run.arm]
        terms = settings.distillation.by_name()
        assert ("attention" in terms) == arm.relates and (settings.teacher.kind == "remote") == arm.asks
        assert ("label_kl" in terms) == (run.arm in ("logits", "both"))
        assert (settings.student.quantiser == "none") == (run.arm == "full_precision")
        assert settings.student.checkpoint_path.endswith(f"stage2-{run.stage2}") == bool(run.stage2)
        assert bool(settings.distillation.balance.shares) == (run.gamma == "shares")


def test_a_student_of_all_layers_begins_as_the_teacher_did() -> None:
    run = Run("rates", "a", 1, "bitnet_sft", 0, 1e-3)
    assert f"student.checkpoint_path={TEACHER}" in run_settings(planned(30, 24, {}), run)
    assert not any(f"student.checkpoint_path={TEACHER}" == line for line in run_settings(PLAN, run))


def leave(folder: Path, run: Run, accuracy: float) -> None:
    """What the trainer leaves of a run that is done."""
    folder.mkdir(parents=True)
    figures = {"cross_entropy": 0.6, "kl": None, "agreement": None, "tokens": 100, "accuracy": accuracy}
    (folder / "evaluation.jsonl").write_text(json.dumps({"step": run.steps, "held_out": figures}) + "\n")
    metrics = [{"step": step + 1, "tokens": 34 * (step + 1), "seconds": 1.0} for step in range(run.steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    example = {"document": "d:1", "prompt": "Review: <b>dull</b>", "right": 0, "student": 1,
               "student_probability": 0.75, "teacher": 0, "teacher_probability": 0.9}  # fmt: skip
    classes = {"step": run.steps, "source": "held_out", "words": [" negative", " positive"],
               "student": [[40, 10], [5, 45]], "teacher": [[48, 2], [1, 49]], "examples": [example]}  # fmt: skip
    (folder / "classes.jsonl").write_text(json.dumps(classes) + "\n")


ENDS = {"full_precision": 0.85, "bitnet_sft": 0.70, "logits": 0.84, "both": 0.72}


def leave_all(root: Path, seeds: int, ends: dict[str, float]) -> list[Run]:
    runs = all_runs(seeds, {"rate-logits-0.001": 0.8})
    for run in runs:
        at = 0.8 if run.name == "rate-logits-0.001" else 0.5
        leave(root / run.name, run, ends.get(run.arm, 0.7) + 0.01 * run.seed if run.phase == "final" else at)
    return runs


def test_what_was_done_is_taken_up_and_told(tmp_path: Path) -> None:
    runs = leave_all(tmp_path, 2, ENDS)
    done = figures_of(tmp_path, PLAN)
    assert list(done) == [run.name for run in runs] and next_run(PLAN, done, 2) is None
    assert next_run(PLAN, done, 3) == next(run for run in known_runs(PLAN, done, 3) if run.seed == 2)
    lines = lines_of(tmp_path, PLAN)
    assert [line["split"] for line in lines if line["phase"] == "final"] == ["test"] * 12
    rows = {row["arm"]: row for row in arm_rows(lines)}
    assert rows["logits"]["test %"] == "84.5 ± 0.7" and rows["logits"]["validation %"] == "80.0"
    assert [row["tokens of stage 2"] for row in length_rows(lines, PLAN)] == ["0", "816", "1,632"]
    said = verdict(lines)
    assert "(logits, which" in said and "differs from BitNet-SFT by +14.0 points, more than twice" in said
    assert "1.0 points behind full precision, within the margin of 2" in said

    write_results(tmp_path, PLAN)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(runs)
    table, page = (tmp_path / "table.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| 84.5 ± 0.7 |" in table and said in table
    assert "test, logits" in page and "<b>dull</b>" not in page and "&lt;b&gt;dull&lt;/b&gt;" in page
    assert "<caption>teacher: 97.0 % of 100 correct</caption>" in page

    # A run whose end is missing is made again, and so is what was chosen by it.
    (tmp_path / "rate-logits-0.002" / "evaluation.jsonl").unlink()
    again = next_run(PLAN, figures_of(tmp_path, PLAN), 2)
    assert again is not None and again.name == "rate-logits-0.002"


def test_without_a_search_the_table_tells_of_the_final_runs_alone(tmp_path: Path) -> None:
    plan = planned(15, 24, {"cpu": "a CPU"}, search=False)
    for run in all_runs_of(plan, 2, {}):
        leave(tmp_path / run.name, run, ENDS.get(run.arm, 0.7) + 0.01 * run.seed)
    lines = lines_of(tmp_path, plan)
    assert next_run(plan, figures_of(tmp_path, plan), 2) is None
    assert {row["validation %"] for row in arm_rows(lines)} == {"–"}
    assert [row["tokens of stage 2"] for row in length_rows(lines, plan)] == ["0", "816", "1,632"]
    assert "(both, as published) differs from BitNet-SFT by +2.0 points" in verdict(lines)
    write_results(tmp_path, plan)
    page = (tmp_path / "report.html").read_text()
    assert "with the first seed, on the test split" in page and "test, both" in page


def test_the_verdict_says_too_where_it_does_not_keep_up(tmp_path: Path) -> None:
    leave_all(tmp_path, 2, ENDS | {"logits": 0.705})
    said = verdict(lines_of(tmp_path, PLAN))
    assert "BitNet-SFT by +0.5 points, not more than twice" in said and "not within the margin of 2" in said
    assert "Too few runs have finished" in verdict([]) and spread([]) == "–" and spread([1.0]) == "1.0"


def test_it_goes_on_where_it_was_stopped_and_starts_each_service_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command as it is typed, with a trainer that is done at once."""
    made: list[str] = []
    served: list[str] = []

    def train(processes: Any, what: str, settings: list[str], *_: Any) -> None:
        if settings[0] == "export":
            served.append("export")
            Path(settings[-1]).mkdir()
            return
        given = dict(line.split("=", 1) for line in settings)
        made.append(given["run.id"])
        shutil.rmtree(tmp_path / given["run.id"], ignore_errors=True)
        leave(tmp_path / given["run.id"], Run("", "", int(given["run.steps"])), 0.5)
        assert ("teacher.url" in given) == (given.get("recipe") == "bitdistill" and "teacher" not in given)
        (tmp_path / given["run.id"] / "checkpoints").mkdir(exist_ok=True)

    @contextmanager
    def serve(name: str) -> Iterator[Callable[[], Any]]:
        served.append(name)
        yield lambda: Teacher("http://t", {}) if name == "teacher" else "http://a"

    monkeypatch.setattr(demo, "RUNS", tmp_path)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "prepared", lambda *_: None)
    monkeypatch.setattr(demo.prepare, "first_layers", lambda layers: None)
    monkeypatch.setattr(demo, "serve_teacher", lambda *_: serve("teacher"))
    monkeypatch.setattr(demo.Processes, "serve", lambda self, name, arguments, log: serve(name))

    def typed(*more: str) -> None:
        monkeypatch.setattr("sys.argv", ["classification", "--steps", "4", "--seeds", "1", *more])
        assert demo.main() == 0

    typed("--runs", "1")
    assert made == ["teacher"] and served == []
    typed("--minutes", "0")
    assert made == ["teacher"], "no run begins after the time"
    typed()
    assert made == [run.name for run in all_runs_of(planned(LAYERS[-1], 4, {}), 1, {})]
    assert served == ["export", "teacher", "stillhouse-attention"]
    kept = {folder.parent.name for folder in tmp_path.glob("*/checkpoints")}
    assert kept == {"teacher", "stage2-4", "stage2-8"}, "only what another run begins with"
    typed("--again", "--runs", "2")
    assert made[-2:] == ["teacher", "rate-full_precision-0.0003"]
    typed("--again", "--no-search", "--runs", "4")
    assert made[-4:] == ["teacher", "stage2-4", "stage2-8", "full_precision-0"]


def test_a_longer_stage_2_begins_with_the_shorter_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RUNS", tmp_path)
    plan = Plan(15, 24, 24, 48, 120, {})
    short, long = (Run("stage2", f"stage2-{steps}", steps, stage2=steps) for steps in plan.lengths[1:])
    go_on(long, plan)
    assert not (tmp_path / "stage2-48").exists()
    leave(tmp_path / "stage2-24", short, 0.5)
    go_on(long, plan)
    assert (tmp_path / "stage2-48" / "metrics.jsonl").is_file()
    (tmp_path / "stage2-48" / "metrics.jsonl").unlink()
    go_on(long, plan)
    assert not (tmp_path / "stage2-48" / "metrics.jsonl").exists(), "what is there is gone on with"
