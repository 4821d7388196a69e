"""muon_clip in whole runs: chosen by its group, logged, independent of the cut into micro batches, resumed exactly."""

from pathlib import Path

import pytest

from student_trainer import loop
from student_trainer.cli.compose import compose
from teacher_proto.process.stopping import StopSignals
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, run_here, steps_of, trace_of

TAU = 0.3
MUON = ("optim=muon_clip", f"optim.qk_clip.tau={TAU}", "optim.micro_batch_rows=2", "optim.learning_rate=0.02")


@pytest.fixture(scope="module")
def straight(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("straight")
    assert run_here(workshop.settings(root, *MUON), ScriptedTargets()) == loop.DONE
    return root / "run"


def test_a_run_learns_and_tells_of_its_clips(straight: Path) -> None:
    lines = lines_of(straight)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert all(set(line) >= {"attention/largest_logit", "attention/clipped_heads"} for line in lines)
    over = [line["attention/largest_logit"] > TAU for line in lines]
    assert [line["attention/clipped_heads"] > 0 for line in lines] == over
    assert sum(over) > 2, "the tau of this test must bite"


def test_the_largest_logit_does_not_depend_on_the_cut_into_micro_batches(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    whole = (*MUON, "optim.micro_batch_rows=null", "run.steps=1")
    assert run_here(workshop.settings(tmp_path, *whole), ScriptedTargets()) == loop.DONE
    (line,) = lines_of(tmp_path / "run")
    assert line["attention/largest_logit"] == pytest.approx(lines_of(straight)[0]["attention/largest_logit"], rel=1e-5)


@pytest.mark.parametrize("step", [3, 7])
def test_a_run_stopped_and_resumed_is_the_straight_run(
    workshop: Workshop, straight: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAt(StopSignals):
        def check(self) -> None:
            if steps_of(tmp_path / "run")[-1:] == [step]:
                raise self.Stop("a test stopped the run")

    arguments = workshop.settings(tmp_path, *MUON)
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", StopAt)
        assert run_here(arguments, ScriptedTargets()) == loop.STOPPED
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "run") == trace_of(straight)
    assert final_files(tmp_path / "run", 12) == final_files(straight, 12)


def test_the_choice_of_group_sets_what_the_settings_say(recwarn: pytest.WarningsRecorder) -> None:
    chosen = compose(["optim=muon_clip", "data.sources={}"]).optim
    assert (chosen.kind, chosen.qk_clip.tau, chosen.qk_clip.alpha, chosen.muon.momentum) == (
        "muon_clip",
        100,
        0.5,
        0.95,
    )
    assert not recwarn.list
    assert compose(["data.sources={}"]).optim.qk_clip.tau is None


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["optim.muon.momentum=0.9"], "optim.muon.momentum"),
        (["optim=muon_clip", "optim.qk_clip.tau=null", "optim.qk_clip.alpha=0.3"], "optim.qk_clip.alpha"),
    ],
)
def test_a_setting_without_effect_warns(overrides: list[str], name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} has no effect"):
        compose([*overrides, "data.sources={}"])
