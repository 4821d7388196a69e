"""Whole runs in this process: the loss is what it says, time does not show in the trace, nothing bad is learnt."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import loop
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.cli.compose import compose
from student_trainer.data.loader import BatchSource
from student_trainer.run import Run
from student_trainer.students.sharding import Unsharded
from student_trainer.targets.guard import NonFiniteError
from student_trainer.targets.protocol import Queries
from student_trainer.targets.queries import spec_of
from teacher_proto.errors import DeadlyRequestError, InvalidTargetsError, TeacherUnavailableError
from teacher_proto.process.stopping import StopSignals
from teacher_service.engines.scripted_model import scripted_logits
from tests.models import VOCAB_SIZE
from tests.trainer_run import (
    ScriptedTargets,
    Workshop,
    final_files,
    lines_of,
    random_delays,
    run_here,
    steps_of,
    teacher_script,
    trace_of,
)


def dense_figures(model: Any, batches: list[Batch]) -> dict[str, float]:
    """Cross-entropy, KL over the teacher's 16 and a tail, agreement: float64, a document at a time, no shared code."""
    sums, count = np.zeros(3), 0
    for batch in batches:
        for d in batch.documents:
            tokens = batch.tokens_BT[d.row, d.start : d.stop].astype(np.int64)
            if len(tokens) < 2:
                continue
            with torch.no_grad():
                z = model(torch.from_numpy(tokens)[None]).logits[0, :-1].double()
            log_q = torch.log_softmax(z, -1).numpy()
            teacher = scripted_logits(tokens, VOCAB_SIZE)[:-1].astype(np.float64)
            log_p = teacher - np.log(np.exp(teacher).sum(-1, keepdims=True))
            for t in range(len(tokens) - 1):
                top = np.argsort(-log_p[t])[:16]
                p, q = np.exp(log_p[t, top]), np.exp(log_q[t, top])
                tail_p, tail_q = 1 - p.sum(), 1 - q.sum()
                kl = (p * np.log(p / q)).sum() + tail_p * np.log(tail_p / tail_q)
                sums += (-log_q[t, tokens[t + 1]], kl, float(log_q[t].argmax() == top[0]))
                count += 1
    ce, kl, agreement = sums / count
    return {"cross_entropy": float(ce), "kl": float(kl), "agreement": float(agreement), "tokens": count}


def source_of(workshop: Workshop) -> BatchSource:
    settings = compose(workshop.settings(Path("unused")))
    return BatchSource(settings.data, AutoTokenizer.from_pretrained(workshop.student), settings.run.seed)


def test_the_first_loss_is_the_mean_over_all_valid_tokens(workshop: Workshop, straight: Path) -> None:
    source = source_of(workshop)
    batch, _ = source.batch(source.initial_state(), 0)
    source.close()
    expected = dense_figures(AutoModelForCausalLM.from_pretrained(workshop.student), [batch])
    first = lines_of(straight)[0]
    assert first["tokens"] == expected["tokens"]
    assert first["loss/cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-5)
    assert first["loss/top_k_kl"] == pytest.approx(expected["kl"], rel=1e-3)  # fp16 on the wire
    assert first["loss"] == pytest.approx(0.5 * first["loss/cross_entropy"] + first["loss/top_k_kl"], rel=1e-9)


def test_held_out_figures_are_those_of_a_dense_evaluation(workshop: Workshop, straight: Path) -> None:
    source = source_of(workshop)
    model = AutoModelForCausalLM.from_pretrained(workshop.student)
    before = lines_of(straight, "evaluation.jsonl")[0]
    assert before["step"] == 0
    for name in ("a", "b"):
        expected = dense_figures(model, source.held_out(name))
        for figure, value in expected.items():
            assert before[name][figure] == pytest.approx(value, rel=1e-3, abs=1e-6), figure
    source.close()


def test_training_lowers_what_it_is_to_lower(straight: Path) -> None:
    first, *_, last = lines_of(straight, "evaluation.jsonl")
    assert [line["step"] for line in lines_of(straight, "evaluation.jsonl")] == [0, 6, 12]
    for name in ("a", "b"):
        assert last[name]["cross_entropy"] < first[name]["cross_entropy"] and last[name]["kl"] < first[name]["kl"]


def test_the_figures_by_source_make_up_the_whole(straight: Path) -> None:
    for line in lines_of(straight):
        counts = [line[f"source/{name}/tokens"] for name in ("a", "b")]
        for term in ("cross_entropy", "top_k_kl"):
            parts = [line[f"source/{name}/{term}"] for name in ("a", "b")]
            assert line[f"loss/{term}"] == pytest.approx(np.average(parts, weights=counts), rel=1e-9)
        assert 0 <= line["wait_share"] <= 1


@pytest.mark.parametrize("depth", [0, 4, 16, "auto"])
def test_the_trace_does_not_depend_on_depth_or_delay(
    workshop: Workshop, straight: Path, tmp_path: Path, depth: int | str
) -> None:
    targets = ScriptedTargets(delay=random_delays(1, 0.05))
    assert run_here(workshop.settings(tmp_path, f"prefetch.depth={depth}"), targets) == 0
    assert trace_of(tmp_path / "run") == trace_of(straight)
    assert final_files(tmp_path / "run", 12) == final_files(straight, 12)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_cut_into_micro_batches_changes_rounding_alone(
    workshop: Workshop, straight: Path, tmp_path: Path, rows: int
) -> None:
    assert run_here(workshop.settings(tmp_path, f"optim.micro_batch_rows={rows}"), ScriptedTargets()) == 0
    for ours, whole in zip(lines_of(tmp_path / "run"), lines_of(straight), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(whole[key], rel=2e-4)


class StopAt(StopSignals):
    """A signal that comes when the metrics have reached a step."""

    def __init__(self, folder: Path, step: int):
        super().__init__()
        self._folder, self._step = folder, step

    def check(self) -> None:
        if steps_of(self._folder)[-1:] == [self._step]:
            raise self.Stop("a test stopped the run")


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8, 11])
def test_a_run_stopped_anywhere_and_resumed_is_the_straight_run(
    workshop: Workshop, straight: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = workshop.settings(tmp_path, "evaluation.every=6")
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", lambda: StopAt(tmp_path / "run", step))
        assert run_here(arguments, ScriptedTargets()) == loop.STOPPED
    assert steps_of(tmp_path / "run") == list(range(1, step + 1))
    assert run_here(arguments, ScriptedTargets(delay=random_delays(step, 0.03))) == loop.DONE
    assert trace_of(tmp_path / "run") == trace_of(straight)
    assert final_files(tmp_path / "run", 12) == final_files(straight, 12)
    assert lines_of(tmp_path / "run", "evaluation.jsonl") == lines_of(straight, "evaluation.jsonl")


def test_lines_of_steps_that_are_made_again_are_taken_out_first(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    """A run killed at step 6 has a checkpoint of step 4 and lines up to 6, the last of them cut."""

    class Killed(BaseException):
        pass

    class KillAt(StopAt):
        def check(self) -> None:
            try:
                super().check()
            except StopSignals.Stop:
                raise Killed from None

    arguments = workshop.settings(tmp_path)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr("teacher_proto.process.stopping.StopSignals", lambda: KillAt(tmp_path / "run", 6))
        run_here(arguments, ScriptedTargets())
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert run_here(arguments, ScriptedTargets()) == 0
    assert trace_of(tmp_path / "run") == trace_of(straight)


class Spoiled(ScriptedTargets):
    """Spoils the answer for one batch."""

    def __init__(self, number: int, spoil: Any):
        super().__init__()
        self._number, self._spoil = number, spoil

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        answer = await super().fetch(batch, queries)
        return self._spoil(answer) if batch.number == self._number else answer


def nan_logprobs(answer: BatchTargets) -> BatchTargets:
    documents = list(answer.documents)
    place = next(i for i, targets in enumerate(documents) if targets is not None)
    targets = documents[place]
    assert targets is not None and targets.logprobs is not None
    logprobs = targets.logprobs.copy()
    logprobs[0] = np.nan
    documents[place] = replace(targets, logprobs=logprobs)
    return replace(answer, documents=tuple(documents))


def test_targets_that_are_not_finite_stop_before_the_update_with_a_dump(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidTargetsError, match=r"logprobs of document [ab]:[0-9]+ is not finite") as caught:
        run_here(workshop.settings(tmp_path), Spoiled(6, nan_logprobs))
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000004"]
    dump = tmp_path / "run" / "dumps" / "batch-00000006"
    about = json.loads((dump / "about.json").read_text())
    assert about["batch"] == 6 and any(d["key"] in str(caught.value) for d in about["documents"])
    assert (dump / "batch.safetensors").exists() and (dump / "targets.safetensors").exists()
    # The teacher mended, the run goes on as if nothing had been.
    assert run_here(workshop.settings(tmp_path), ScriptedTargets()) == 0
    assert trace_of(tmp_path / "run") == trace_of(straight)


def spoil_step(monkeypatch: pytest.MonkeyPatch, folder: Path, after: int, spoil: Any) -> None:
    """Let `spoil(model)` happen to the student before or within the update that follows step `after`."""
    from student_trainer.students.student import Student

    real = Student.before_step

    def before_step(self: Student, number: int) -> None:
        real(self, number)
        if number == after:
            spoil(self.model)

    monkeypatch.setattr(Student, "before_step", before_step)


def nan_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan


def infinite_gradient(model: Any) -> None:
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (nan_weight, r"step 3 is not finite \(loss nan.*cross_entropy is nan in source [ab], document [ab]:[0-9]+"),
        (infinite_gradient, r"step 3 is not finite.*gradient of model.layers.0.mlp.down_proj.weight is not"),
    ],
)
def test_a_step_that_is_not_finite_is_not_made(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, said: str
) -> None:
    spoil_step(monkeypatch, tmp_path / "run", 2, spoil)
    made: list[int] = []
    from student_trainer.optim.optimizer import Optimizer

    real = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, number: made.append(number) or real(self, number))
    with pytest.raises(NonFiniteError, match=said):
        run_here(workshop.settings(tmp_path), ScriptedTargets())
    assert made == [0, 1] and steps_of(tmp_path / "run") == [1, 2]
    assert (tmp_path / "run" / "dumps" / "step-00000003" / "targets.safetensors").exists()


FULL = """
import resource, signal, sys
from pathlib import Path
from student_trainer.reporting.logs import LineFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
file = LineFile(path)
file.append({"step": 1})
for step, room in ((2, 8), (3, 0), (4, None), (5, 3)):
    most = resource.RLIM_INFINITY if room is None else path.stat().st_size + room
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    file.append({"step": step})
    print(len(path.read_text().splitlines()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.close()
"""


def test_lines_for_which_a_disk_has_no_room_wait_and_none_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "metrics.jsonl")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout.split() == ["1", "1", "4", "4"]
    assert ended.stderr.count("could not be written") == 3 and "Exception ignored" not in ended.stderr
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_full_disk_does_not_hide_why_a_run_ends(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("student_trainer.targets.guard.write_dump", full)
    spoil_step(monkeypatch, tmp_path / "run", 2, nan_weight)
    with pytest.raises(NonFiniteError, match=r"step 3 is not finite.*could not be written to .*No space left"):
        run_here(workshop.settings(tmp_path), ScriptedTargets())
    with pytest.raises(InvalidTargetsError, match=r"is not finite.*could not be written to .*No space left"):
        run_here(workshop.settings(tmp_path / "targets"), Spoiled(1, nan_logprobs))


@pytest.mark.parametrize("shift", [-1, 1])
def test_targets_off_by_one_are_caught_before_the_first_update(workshop: Workshop, tmp_path: Path, shift: int) -> None:
    with pytest.raises(InvalidTargetsError, match="off by one"):
        run_here(workshop.settings(tmp_path), ScriptedTargets(teacher_script(shift=shift)))
    assert steps_of(tmp_path / "run") == []
    assert (tmp_path / "run" / "dumps" / "batch-00000000" / "targets.safetensors").exists()


def test_a_teacher_that_never_comes_back_ends_the_run_and_leaves_it_resumable(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    class Gone(ScriptedTargets):
        async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
            if batch.number >= 6:
                raise TeacherUnavailableError("nobody answers")
            return await super().fetch(batch, queries)

    with pytest.raises(TeacherUnavailableError):
        run_here(workshop.settings(tmp_path), Gone())
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert run_here(workshop.settings(tmp_path), ScriptedTargets()) == 0
    assert trace_of(tmp_path / "run") == trace_of(straight)


def test_cross_entropy_alone_needs_no_teacher_but_for_its_figures(workshop: Workshop, tmp_path: Path) -> None:
    targets = ScriptedTargets()
    arguments = workshop.settings(tmp_path, "distillation=cross_entropy", "evaluation.every=12", "run.id=ce")
    assert run_here(arguments, targets) == 0
    first = lines_of(tmp_path / "ce", "evaluation.jsonl")[0]
    assert first["a"]["kl"] > 0
    lonely = [line for line in workshop.settings(tmp_path, "distillation=cross_entropy", "evaluation.every=12",
              "teacher=none", "run.id=alone") if not line.startswith("teacher.")]  # fmt: skip
    assert run_here(lonely) == 0
    assert trace_of(tmp_path / "alone") == trace_of(tmp_path / "ce")
    assert lines_of(tmp_path / "alone", "evaluation.jsonl")[0]["a"]["kl"] is None


def test_a_passage_shows_what_both_would_have_said(straight: Path) -> None:
    passage = json.loads((straight / "passage.json").read_text())
    assert passage[0]["teacher"] == [] and len(passage) > 2
    for token in passage[1:]:
        assert len(token["teacher"]) == len(token["student"]) == 5
        for guesses in (token["teacher"], token["student"]):
            p = [probability for _, probability in guesses]
            assert p == sorted(p, reverse=True) and 0 < sum(p) <= 1.001


@pytest.mark.parametrize("micro_batch", [5, 10, 39])
def test_an_update_that_is_dropped_half_way_leaves_no_trace(
    workshop: Workshop, tmp_path: Path, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two micro batches, of a student whose dropout has drawn random numbers by then."""
    student = tmp_path / "student"
    shutil.copytree(workshop.student, student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    arguments = workshop.settings(
        tmp_path, f"student.checkpoint_path={student}", "optim.micro_batch_rows=1", "checkpoint.every=5"
    )
    done = []

    def pause(run: Run) -> None:
        done.append(run.state.step)
        if len(done) == micro_batch:
            raise StopSignals.Stop("a test stopped the run")

    assert run_here([*arguments, "run.id=straight"], ScriptedTargets()) == loop.DONE
    with monkeypatch.context() as patched:
        patched.setattr(Run, "pause", pause)
        assert run_here([*arguments, "run.id=stopped"], ScriptedTargets()) == loop.STOPPED
    assert steps_of(tmp_path / "stopped") == list(range(1, micro_batch // 4 + 1))
    assert run_here([*arguments, "run.id=stopped"], ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "stopped") == trace_of(tmp_path / "straight")
    assert final_files(tmp_path / "stopped", 12) == final_files(tmp_path / "straight", 12)


OWN_TEXT = ("on_policy.share=0.5", "on_policy.lag=0", "on_policy.prompt_tokens=6", "on_policy.new_tokens=4")
SHARES = "distillation.balance.shares={cross_entropy: 1, top_k_kl: 1}"
GATHER = ("distillation.terms.top_k_kl.support=gather", "distillation.terms.top_k_kl.kind=reverse_kl")
ALONE = {
    "nothing": ((), []),
    "measured": ((SHARES, "distillation.balance.every=4"), [0, 4, 8]),
    "written": (("on_policy=gkd", *OWN_TEXT), [1, 3, 5, 7, 9, 11]),
    "asked": (GATHER, [*range(12)]),
}


def test_a_refused_request_between_two_updates_leaves_its_batch_behind_too(workshop: Workshop, tmp_path: Path) -> None:
    class Deadly(ScriptedTargets):
        async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
            if batch.number == 2 and "gather" in spec_of(queries).kinds:
                raise DeadlyRequestError("the engine dies of one sequence")
            return await super().fetch(batch, queries)

    with pytest.raises(DeadlyRequestError, match=r"dies of one sequence.*dumps/batch-00000002"):
        run_here(workshop.settings(tmp_path, *GATHER), Deadly())
    assert steps_of(tmp_path / "run") == [1, 2]
    assert (tmp_path / "run" / "dumps" / "batch-00000002" / "batch.safetensors").exists()


@pytest.mark.parametrize("name", ALONE)
def test_the_student_is_gathered_only_for_updates_that_have_it_whole_on_a_rank(
    workshop: Workshop, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = ALONE[name]
    gathered: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(Unsharded, "refresh", lambda _, step: gathered.append(step))
        assert run_here(workshop.settings(tmp_path, *given), ScriptedTargets()) == loop.DONE
    assert gathered == expected
