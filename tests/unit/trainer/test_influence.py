"""Runs whose mixture follows the probe: measured where it is due, resumed alike, with every student and loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student_trainer import loop
from student_trainer.cli.compose import compose
from tests.trainer_run import (
    ScriptedTargets,
    Workshop,
    final_files,
    lines_of,
    random_delays,
    run_here,
    trace_of,
    write_documents,
)
from tests.unit.trainer.test_loop import StopAt

LAG, INTERVAL, SKETCHED, STEPS = 2, 4, 2, 12


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    made.sources["probe"] = write_documents(made.folder / "probe.jsonl", 60, 7)
    return made


def given(workshop: Workshop, root: Path, *overrides: str) -> list[str]:
    return workshop.settings(
        root, "data.mixture.policy=influence", f"data.mixture.lag={LAG}", f"data.mixture.update_interval={INTERVAL}",
        f"data.mixture.sketch_steps={SKETCHED}", "data.mixture.sketch_size=256", "data.mixture.probe=probe",
        "data.sources.probe.weight=0", "data.sources.probe.held_out_fraction=1", *overrides,
    )  # fmt: skip


def run(workshop: Workshop, root: Path, *overrides: str) -> list[dict[str, Any]]:
    assert run_here(given(workshop, root, *overrides), ScriptedTargets()) == loop.DONE
    return lines_of(root / "run")


def assert_same(run: Path, straight: Path) -> None:
    assert trace_of(run) == trace_of(straight)
    assert final_files(run, STEPS) == final_files(straight, STEPS)
    mine, its = (json.loads((f / f"checkpoints/step-{STEPS:08d}/state.json").read_text()) for f in (run, straight))
    for part in ("mixture", "mixture_policy", "tokens"):
        assert mine[part] == its[part]


@pytest.fixture(scope="module")
def straight(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("straight")
    run(workshop, root, "prefetch.depth=1")
    return root / "run"


def test_decisions_come_with_scores_and_hold_from_the_lag_on(straight: Path) -> None:
    lines = lines_of(straight)
    decided = [line for line in lines if "decided/a" in line]
    assert [line["step"] for line in decided] == [4, 8, 12]
    for line in decided:
        assert -1 <= line["reason/a/score"] <= 1 and "the probe's loss" in line["decided_note"]
        assert "reason/probe/score" not in line and "decided/probe" not in line
    assert lines[4 + LAG - 2]["mixture/a"] == 0.5 and lines[4 + LAG - 1]["mixture/a"] == decided[0]["decided/a"] != 0.5


@pytest.mark.parametrize("depth", [4, 16, "auto"])
def test_what_is_in_flight_changes_nothing(
    workshop: Workshop, straight: Path, tmp_path: Path, depth: int | str
) -> None:
    arguments = given(workshop, tmp_path, f"prefetch.depth={depth}", "data.workers=3", "data.batches_ahead=9")
    assert run_here(arguments, ScriptedTargets(delay=random_delays(1, 0.05))) == loop.DONE
    assert_same(tmp_path / "run", straight)


@pytest.mark.parametrize("step", range(1, 10))
def test_a_run_stopped_anywhere_is_the_straight_run(
    workshop: Workshop, straight: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given(workshop, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", lambda: StopAt(tmp_path / "run", step))
        assert run_here(arguments, ScriptedTargets()) == loop.STOPPED
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert_same(tmp_path / "run", straight)


def test_measuring_changes_nothing_of_what_is_learnt(workshop: Workshop, tmp_path: Path) -> None:
    """A run whose decisions come too late to matter is the static one, bit for bit."""
    run(workshop, tmp_path / "one", "data.mixture.lag=100")
    probe = ("data.sources.probe.weight=0", "data.sources.probe.held_out_fraction=1")
    assert run_here(workshop.settings(tmp_path / "two", *probe), ScriptedTargets()) == loop.DONE
    assert final_files(tmp_path / "one/run", STEPS) == final_files(tmp_path / "two/run", STEPS)


def test_the_cut_into_micro_batches_changes_scores_by_rounding_alone(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    for line, other in zip(run(workshop, tmp_path, "optim.micro_batch_rows=1"), lines_of(straight), strict=True):
        for key in line:
            if key.startswith(("reason/", "decided/")):
                assert line[key] == pytest.approx(other[key], abs=2e-4)


def test_a_probe_that_gets_worse_brings_the_sources_own_weights_back(workshop: Workshop, tmp_path: Path) -> None:
    lines = run(workshop, tmp_path, "optim.learning_rate=0.5", "data.mixture.eta=50", "optim.schedule.warmup_steps=6")
    notes = [line["decided_note"] for line in lines if "decided_note" in line]
    assert any("back to the configured weights: the probe's loss rose" in note for note in notes), notes
    back = next(line for line in lines if "back to" in line.get("decided_note", ""))
    assert back["decided/a"] == pytest.approx(0.5, abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(
    "changes",
    [
        ("student=bitnet", "student.quantisation.warmup_steps=4"),
        ("student.lora.rank=2",),
        ("student=bitnet", "student.lora.rank=2"),
        ("student=diffusion", "student.diffusion.block_size=4"),
        ("student=diffusion", "distillation=tcs", "student.diffusion.block_size=4"),
        ("student.compute=bfloat16",),
        ("student.gradient_checkpointing=true",),
        ("distillation.terms.top_k_kl.kind=reverse_kl", "distillation.terms.top_k_kl.support=gather"),
        ("on_policy=gkd", "on_policy.share=0.4", "on_policy.prompt_tokens=6", "on_policy.new_tokens=10",
         "on_policy.lag=1"),
        ("data.mixture.precondition=true",),
        ("data.mixture.score=doge", "data.mixture.kept=0"),
        ("data.mixture.score=dot",),
        ("distillation.balance.shares={cross_entropy: 1, top_k_kl: 1}",),
    ],
)  # fmt: skip
def test_every_student_and_loss_is_measured(workshop: Workshop, tmp_path: Path, changes: tuple[str, ...]) -> None:
    lines = run(workshop, tmp_path, *changes, "run.steps=8", "optim.micro_batch_rows=2")
    scores = [line["reason/a/score"] for line in lines if "reason/a/score" in line]
    assert scores and any(scores)


def test_without_a_teacher_it_goes_by_the_data_alone(workshop: Workshop, tmp_path: Path) -> None:
    arguments = given(workshop, tmp_path, "teacher.kind=none", "~distillation.terms.top_k_kl", "teacher.top_k=32")
    arguments = [each for each in arguments if not each.startswith("teacher.top_k")]
    assert run_here(arguments) == loop.DONE
    assert any("decided/a" in line for line in lines_of(tmp_path / "run"))


def test_a_probe_that_is_trained_on_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    shared = workshop.sources["probe"].read_text().splitlines(keepends=True)[5]
    other = tmp_path / "other.jsonl"
    other.write_text(workshop.sources["a"].read_text() + shared)
    with pytest.raises(ValueError, match="source 'a' trains on its document 150, which is also in the probe"):
        run(workshop, tmp_path, f"data.sources.a.path={other}", "data.sources.a.held_out_fraction=0")
    run(workshop, tmp_path / "b", f"data.sources.a.path={other}", "data.sources.a.held_out_fraction=1",
        "data.sources.a.weight=0")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("data.mixture.probe=nobody",), "mixture names source 'nobody'"),
        (("data.mixture.sketch_size=1000",), "sketch_size is 1000, expected a power of two"),
        (("data.mixture.sketch_steps=9",), "sketch_steps is 9, but there are only 4 updates"),
        (("data.mixture.precondition=true", "optim=muon_clip"), "divides by Adam's second moments"),
    ],
)
def test_what_cannot_be_is_refused(workshop: Workshop, tmp_path: Path, changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(given(workshop, tmp_path, *changes))


def test_a_probe_of_which_nothing_is_held_out_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its held_out_fraction is 0, so it has no held-out documents"):
        run(workshop, tmp_path, "data.mixture.probe=a", "data.sources.a.held_out_fraction=0")


def test_without_a_name_all_that_is_held_out_is_the_probe(workshop: Workshop, tmp_path: Path) -> None:
    """By the names that the trainer's predecessor had for it, too."""
    lines = run(workshop, tmp_path / "one", "data.mixture.probe=[]", "data.held_out_rows=3")
    given_before = [each for each in given(workshop, tmp_path / "two") if not each.startswith("data.mixture")]
    names = {"enabled": "true", "update_interval": INTERVAL, "sketch_steps": SKETCHED, "sketch_size": 256, "lag": LAG}
    aliases = [f"influence.{name}={value}" for name, value in names.items()]
    assert run_here([*given_before, *aliases], ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "two/run") == trace_of(tmp_path / "one/run")
    assert "reason/a/score" in lines[INTERVAL - 1]
    with pytest.raises(ValueError, match="no source has a held_out_fraction above 0"):
        run(workshop, tmp_path / "three", "data.mixture.probe=[]",
            *(f"data.sources.{name}.held_out_fraction=0" for name in ("a", "b", "probe")))  # fmt: skip


def test_the_second_name_says_what_it_became(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plain = [each for each in given(workshop, tmp_path) if not each.startswith("data.mixture")]
    made = compose([*plain, "influence.enabled=true", "influence.update_interval=500"]).data.mixture
    assert made.policy == "influence" and made.update_interval == 500
    assert "influence.enabled=true is now data.mixture.policy=influence" in caplog.text
    assert "influence.update_interval=500 is now data.mixture.update_interval=500" in caplog.text
    assert compose([*plain, "influence.enabled=false", "influence.update_interval=500"]).data.mixture.policy == "static"
    with pytest.raises(ValueError, match=r"there is no setting 'data\.mixture\.update_intervall'"):
        compose([*plain, "influence.enabled=true", "influence.update_intervall=500"])


def test_modules_that_are_not_trained_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is trained in modules named down_proj"):
        run(workshop, tmp_path, "student.lora.rank=2", "student.lora.targets=[q_proj]")


@pytest.mark.slow
def test_a_compiled_student_is_measured_as_the_same_one_is(workshop: Workshop, tmp_path: Path) -> None:
    """Sketched passes are not compiled: compiled code calls no hooks."""
    scores = [
        [line[f"reason/{name}/score"] for line in run(workshop, tmp_path / compiled, f"student.compile={compiled}",
                                                      "run.steps=8") for name in "ab" if f"reason/{name}/score" in line]
        for compiled in ("false", "true")
    ]  # fmt: skip
    assert scores[0] == pytest.approx(scores[1], abs=1e-4) and scores[0]
