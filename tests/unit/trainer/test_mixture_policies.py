"""Whole runs by each policy: the weights follow the losses by the rule, within bounds, resumed and prefetched alike."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from student_trainer import loop
from student_trainer.cli.compose import compose
from student_trainer.data.policies.updates import bounded_step
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, random_delays, run_here, trace_of
from tests.unit.trainer.test_loop import StopAt

LAG, INTERVAL, STEPS = 2, 3, 12
POLICIES = ("excess", "divergence", "ado")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def given(workshop: Workshop, root: Path, policy: str, *overrides: str) -> list[str]:
    return workshop.settings(
        root, f"data.mixture.policy={policy}", f"data.mixture.lag={LAG}", f"data.mixture.update_interval={INTERVAL}",
        "data.sources.b.weight=0.25", "data.sources.a.weight=0.75", *overrides,
    )  # fmt: skip


def run(workshop: Workshop, root: Path, policy: str, *overrides: str) -> list[dict[str, Any]]:
    assert run_here(given(workshop, root, policy, *overrides), ScriptedTargets()) == loop.DONE
    return lines_of(root / "run")


@pytest.mark.parametrize(
    ("policy", "figures"),
    [("excess", ("student_cross_entropy", "teacher_cross_entropy")), ("divergence", ("teacher_divergence",))],
)
def test_the_weights_are_those_of_the_rule(
    workshop: Workshop, tmp_path: Path, policy: str, figures: tuple[str, ...]
) -> None:
    lines = run(workshop, tmp_path, policy)
    weights = {"a": 0.75, "b": 0.25}
    for step in range(INTERVAL, STEPS + 1, INTERVAL):
        since = lines[step - INTERVAL : step]
        gaps = {}
        for name in "ab":
            tokens = sum(line[f"source/{name}/tokens"] for line in since)
            own, *less = (
                sum(line[f"source/{name}/{figure}"] * line[f"source/{name}/tokens"] for line in since) / tokens
                for figure in figures
            )
            gaps[name] = own - sum(less)
            assert lines[step - 1][f"reason/{name}/{policy}"] == pytest.approx(gaps[name], rel=1e-9)
        weights = bounded_step(weights, gaps, 0.5)
        assert {name: lines[step - 1][f"decided/{name}"] for name in "ab"} == pytest.approx(weights, rel=1e-9)
        for line in lines[step - 1 + LAG : step - 1 + LAG + INTERVAL]:
            assert {name: line[f"mixture/{name}"] for name in "ab"} == pytest.approx(weights, rel=1e-9)
    assert sum("decided/a" in line for line in lines) == STEPS // INTERVAL


def test_what_is_watched_changes_nothing_of_what_is_learnt(workshop: Workshop, tmp_path: Path) -> None:
    """Before the first decision the run is the static one, bit for bit; the watched figures are those of the losses."""
    fixed = ("data.mixture.update_interval=100", "distillation.terms.own.kind=cross_entropy",
             "distillation.terms.own.coefficient=0.5")  # fmt: skip
    lines = run(workshop, tmp_path / "one", "excess", *fixed)
    assert run_here(
        workshop.settings(tmp_path / "two", "data.sources.b.weight=0.25", "data.sources.a.weight=0.75", *fixed[1:]),
        ScriptedTargets(),
    ) == loop.DONE  # fmt: skip
    for line, other in zip(lines, lines_of(tmp_path / "two" / "run"), strict=True):
        for key in ("loss", "grad_norm", "loss/own", "source/a/tokens"):
            assert line[key] == other[key]
        assert line["loss/student_cross_entropy"] == line["loss/own"]
        assert line["weighted/student_cross_entropy"] == 0.0
    assert final_files(tmp_path / "one" / "run", STEPS) == final_files(tmp_path / "two" / "run", STEPS)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_a_run_stopped_around_a_decision_is_the_straight_run(
    workshop: Workshop, tmp_path: Path, policy: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workshop, tmp_path / "straight", policy, "prefetch.depth=1")
    arguments = given(workshop, tmp_path, policy, "prefetch.depth=auto", "data.workers=2")
    targets = ScriptedTargets(delay=random_delays(step, 0.02))
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", lambda: StopAt(tmp_path / "run", step))
        assert run_here(arguments, targets) == loop.STOPPED
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    straight = tmp_path / "straight" / "run"
    assert trace_of(tmp_path / "run") == trace_of(straight)
    assert final_files(tmp_path / "run", STEPS) == final_files(straight, STEPS)
    mine, its = (
        json.loads((folder / f"checkpoints/step-{STEPS:08d}/state.json").read_text())
        for folder in (tmp_path / "run", straight)
    )
    assert mine["mixture_policy"] == its["mixture_policy"] and mine["mixture"] == its["mixture"]


def test_the_exponentiated_form_is_held_by_the_cap_and_the_floor(workshop: Workshop, tmp_path: Path) -> None:
    lines = run(
        workshop, tmp_path, "divergence", "data.mixture.form=exponentiated", "data.mixture.eta=1000",
        "data.mixture.update_interval=1", "data.mixture.floor=0.4", "data.mixture.cap=0.85",
    )  # fmt: skip
    shares = [line["mixture/a"] for line in lines[LAG:]]
    assert max(shares) <= 0.85 + 1e-12 and min(shares) >= 0.4 * 0.75 - 1e-12
    assert any(share == pytest.approx(0.85) or share == pytest.approx(0.3) for share in shares), "a bound was reached"


def test_shares_move_among_the_named_sources_alone(workshop: Workshop, tmp_path: Path) -> None:
    """Of three sources two are like the probe; a source of weight 0 is never drawn."""
    third = [f"data.sources.c.{field}" for field in (
        "kind=jsonl", "format=tokens", f"path={workshop.sources['b']}", "held_out_fraction=0.1", "weight=1.0",
    )]  # fmt: skip
    none = [line.replace("sources.c", "sources.d").replace("weight=1.0", "weight=0") for line in third]
    lines = run(workshop, tmp_path, "excess", "data.mixture.over=[a,c]", *third, *none)
    for line in lines[LAG + INTERVAL - 1 :]:
        assert line["mixture/b"] == pytest.approx(0.125, abs=1e-12) and line["mixture/d"] == 0
        assert line["mixture/a"] + line["mixture/c"] == pytest.approx(0.875)
        assert "source/d/tokens" not in line
    assert lines[-1]["mixture/a"] != pytest.approx(0.375)


def test_one_source_alone_keeps_all(workshop: Workshop, tmp_path: Path) -> None:
    lines = run(workshop, tmp_path, "excess", "data.sources.b.weight=0", "data.mixture.cap=0.5")
    assert {line["mixture/a"] for line in lines} == {1.0} and any("decided/a" in line for line in lines)


def test_a_source_that_runs_dry_begins_again(workshop: Workshop, tmp_path: Path) -> None:
    """Its share is kept by reading it anew, epoch after epoch."""
    short = tmp_path / "short.jsonl"
    short.write_text("".join(workshop.sources["a"].read_text().splitlines(keepends=True)[:6]))
    lines = run(workshop, tmp_path, "divergence", f"data.sources.a.path={short}", "data.sources.a.held_out_fraction=0")
    drawn = sum(line.get("source/a/tokens", 0) for line in lines)
    assert drawn / sum(line.get("source/a/tokens", 0) + line.get("source/b/tokens", 0) for line in lines) > 0.4
    state = json.loads((tmp_path / f"run/checkpoints/step-{STEPS:08d}/state.json").read_text())
    assert state["mixture"]["sources"]["a"]["cursor"][0] >= 2, "two epochs or more"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.mixture.over=[a,z]",), "mixture names source 'z'; the sources are a, b"),
        (("data.mixture.policy=exess",), "expected one of static, excess"),
        (("data.mixture.policy=static",), "update_interval is not a setting of policy static, only of excess"),
        (("teacher.kind=none", "~distillation.terms.top_k_kl"), "teacher.kind is none, but data.mixture.policy=excess"),
        (("on_policy=reverse_kl", "on_policy.share=1.0", "on_policy.prompt_tokens=4", "on_policy.new_tokens=4"),
         "no batch comes from the data"),
        (("data.mixture.cap=0",), "data.mixture.cap"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    workshop: Workshop, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compose(given(workshop, tmp_path, "excess", *overrides))


def test_a_term_that_has_the_name_of_a_figure_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    named = ("distillation.terms.student_cross_entropy.kind=cross_entropy",)
    with pytest.raises(ValueError, match="has a term 'student_cross_entropy'"):
        run_here(given(workshop, tmp_path, "excess", *named), ScriptedTargets())


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(
    "student", [("student=bitnet",), ("student.lora.rank=2",), ("student=diffusion", "student.diffusion.block_size=4")]
)
def test_every_student_can_be_watched(workshop: Workshop, tmp_path: Path, student: tuple[str, ...]) -> None:
    for policy in POLICIES:
        lines = run(workshop, tmp_path / policy, policy, *student, "run.steps=9", "optim.micro_batch_rows=2")
        assert "decided/a" in lines[8]


def test_decisions_are_said_with_their_reasons(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(workshop, tmp_path, "excess", "logging.progress=on", "run.steps=4")
    said = capfd.readouterr()
    assert "mixture from step 5 on: a 0." in said.out + said.err and "(excess" in said.out + said.err
