"""Whole runs whose mixture follows the losses: the same batches whatever is in flight, resumed bit for bit anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from student_trainer import loop
from student_trainer.cli import sequences
from student_trainer.cli.compose import compose
from student_trainer.data.policies import decisions
from tests import mixture_policy
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, random_delays, run_here, trace_of
from tests.unit.trainer.test_loop import StopAt

LAG = 3
OWN = ("on_policy=reverse_kl", "on_policy.prompt_tokens=6", "on_policy.new_tokens=10", "on_policy.lag=2")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module", autouse=True)
def by_loss() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(decisions.POLICIES, "static", None)
        mixture_policy.install()
        yield


@pytest.fixture(scope="module")
def straight(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("straight")
    assert run_here(given(workshop, root, "prefetch.depth=1"), ScriptedTargets()) == 0
    return root / "run"


def given(workshop: Workshop, root: Path, *overrides: str) -> list[str]:
    return workshop.settings(root, f"data.mixture.lag={LAG}", *overrides)


def assert_same(run: Path, straight: Path) -> None:
    assert trace_of(run) == trace_of(straight)
    assert final_files(run, 12) == final_files(straight, 12)
    mine, its = (json.loads((each / "checkpoints/step-00000012/state.json").read_text()) for each in (run, straight))
    for part in ("mixture", "mixture_policy", "tokens"):
        assert mine[part] == its[part]


def test_the_weights_follow_the_losses_by_the_lag(straight: Path) -> None:
    lines = lines_of(straight)
    shares = [line["mixture/a"] for line in lines]
    assert shares[:LAG] == [0.5] * LAG
    policy = mixture_policy.ByLoss()
    for number, line in enumerate(lines[:-LAG]):
        policy = policy.observe(number, {name: line[name] for name in line if name.startswith(("loss", "source/"))})
        assert shares[number + LAG] == pytest.approx(policy.weights(number)["a"], abs=1e-12)
    assert len(set(shares)) == 12 - LAG + 1


@pytest.mark.parametrize("depth", [4, 16, "auto"])
def test_the_batches_do_not_depend_on_how_many_are_in_flight(
    workshop: Workshop, straight: Path, tmp_path: Path, depth: int | str
) -> None:
    arguments = given(workshop, tmp_path, f"prefetch.depth={depth}", "data.workers=3", "data.batches_ahead=9")
    assert run_here(arguments, ScriptedTargets(delay=random_delays(1, 0.05))) == 0
    assert_same(tmp_path / "run", straight)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 8])
def test_a_run_stopped_anywhere_and_resumed_is_the_straight_run(
    workshop: Workshop, straight: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given(workshop, tmp_path, "prefetch.depth=2")
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", lambda: StopAt(tmp_path / "run", step))
        assert run_here(arguments, ScriptedTargets()) == loop.STOPPED
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert_same(tmp_path / "run", straight)


@pytest.mark.parametrize("depth", [0, 8])
def test_a_student_that_writes_reads_ahead_no_further_than_is_decided(
    workshop: Workshop, tmp_path: Path, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are read `on_policy.lag` updates ahead by the thread that decides; the other one waits for decisions."""
    assert run_here(given(workshop, tmp_path / "one", *OWN, "prefetch.depth=1"), ScriptedTargets()) == 0
    arguments = given(workshop, tmp_path, *OWN, f"prefetch.depth={depth}")
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", lambda: StopAt(tmp_path / "run", 5))
        assert run_here(arguments, ScriptedTargets()) == loop.STOPPED
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert_same(tmp_path / "run", tmp_path / "one" / "run")


def test_documents_that_depend_on_losses_are_not_written_ahead(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its documents are not known in advance"):
        list(sequences.documents(compose(given(workshop, tmp_path))))
