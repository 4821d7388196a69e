"""Whole runs in which the student writes batches: the loss that is said, the same trace whatever the time it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer import loop
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.targets.protocol import Queries
from teacher_service.engines.scripted_model import scripted_logits
from tests.models import VOCAB_SIZE
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, random_delays, run_here, trace_of
from tests.unit.on_policy.conftest import OWN
from tests.unit.trainer.test_loop import StopAt


class Watching(ScriptedTargets):
    """Keeps the batches that it was asked about, by number."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.batches: dict[int, Batch] = {}

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        self.batches[batch.number] = batch
        return await super().fetch(batch, queries)


def test_every_second_batch_is_the_students_own(straight: Path) -> None:
    lines = lines_of(straight)
    assert [line["on_policy"] for line in lines] == [0, 1] * 6
    for line in lines:
        own = [key for key in line if key.startswith("loss/")] == ["loss/on_policy_reverse_kl"]
        assert own == bool(line["on_policy"]) == ("on_policy/mean_length" in line)
        assert line["on_policy/write_s"] >= 0


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_each_batch_is_written_by_the_student_of_its_step(workshop: Workshop, tmp_path: Path, lag: int) -> None:
    """What is asked of the teacher is what that checkpoint's student writes: no more and no less updates."""
    targets = Watching()
    arguments = workshop.settings(tmp_path, *OWN, f"on_policy.lag={lag}", "checkpoint.every=1", "checkpoint.keep=20")
    assert run_here(arguments, targets) == 0
    for number in (1, 5, 11):
        batch = targets.batches[number]
        assert batch.kind == "rollout" and batch.rollout is not None
        logprob = batch.rollout.means()["logprob"]
        assert mean_logprob(workshop, tmp_path / "run", max(0, number - lag), batch) == pytest.approx(logprob, abs=1e-4)
        others = [mean_logprob(workshop, tmp_path / "run", step, batch) for step in (number, max(0, number - 4))]
        assert lag in (0, 4) or any(abs(other - logprob) > 1e-3 for other in others)


def mean_logprob(workshop: Workshop, run: Path, step: int, batch: Batch) -> float:
    """What the student after `step` updates says of the written tokens, a document at a time."""
    from safetensors.torch import load_file

    model: Any = AutoModelForCausalLM.from_pretrained(workshop.student)
    if step:
        model.load_state_dict(load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"), strict=False)
    total, count = 0.0, 0
    for d in batch.documents:
        ids_T = torch.from_numpy(batch.tokens_BT[d.row, d.start : d.stop].astype(np.int64))
        with torch.no_grad():
            log_q_TV = torch.log_softmax(model(ids_T[None]).logits[0], -1)
        counted = np.flatnonzero(batch.loss_mask_BT[d.row, d.start : d.stop - 1])
        total += float(log_q_TV[counted, ids_T[counted + 1]].sum())
        count += len(counted)
    return total / count


def test_the_loss_is_the_reverse_kl_on_what_was_written(workshop: Workshop, tmp_path: Path) -> None:
    targets = Watching()
    assert run_here(workshop.settings(tmp_path, *OWN, "on_policy.share=1", "run.steps=1"), targets) == 0
    model, batch = AutoModelForCausalLM.from_pretrained(workshop.student), targets.batches[0]
    total, count = 0.0, 0
    for d in batch.documents:
        tokens = batch.tokens_BT[d.row, d.start : d.stop].astype(np.int64)
        with torch.no_grad():
            log_q = torch.log_softmax(model(torch.from_numpy(tokens)[None]).logits[0].double(), -1).numpy()
        z = scripted_logits(tokens, VOCAB_SIZE).astype(np.float64)
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        for t in np.flatnonzero(batch.loss_mask_BT[d.row, d.start : d.stop - 1]):
            top = np.argsort(-log_p[t])[:16]
            p, q = np.exp(log_p[t, top]), np.exp(log_q[t, top])
            tail_p, tail_q = 1 - p.sum(), 1 - q.sum()
            total += (q * np.log(q / p)).sum() + tail_q * np.log(tail_q / tail_p)
            count += 1
    [line] = lines_of(tmp_path / "run")
    assert line["tokens"] == count
    assert line["loss"] == line["loss/on_policy_reverse_kl"] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("depth", [0, 4, "auto"])
def test_the_trace_does_not_depend_on_depth_or_delay(
    workshop: Workshop, straight: Path, tmp_path: Path, depth: int | str
) -> None:
    targets = ScriptedTargets(delay=random_delays(1, 0.05))
    assert run_here(workshop.settings(tmp_path, *OWN, f"prefetch.depth={depth}"), targets) == 0
    assert trace_of(tmp_path / "run") == trace_of(straight)
    assert final_files(tmp_path / "run", 12) == final_files(straight, 12)


@pytest.mark.parametrize(("lag", "step"), [(0, 5), (1, 1), (1, 4), (1, 7), (3, 4), (3, 9)])
def test_a_run_stopped_anywhere_and_resumed_is_the_straight_run(
    workshop: Workshop, tmp_path: Path, lag: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written and not learnt from is not written again by a later student."""
    arguments = [*OWN, f"on_policy.lag={lag}"]
    assert run_here(workshop.settings(tmp_path / "straight", *arguments), ScriptedTargets()) == 0
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", lambda: StopAt(tmp_path / "run", step))
        assert run_here(workshop.settings(tmp_path, *arguments), ScriptedTargets()) == loop.STOPPED
    assert run_here(workshop.settings(tmp_path, *arguments), ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "run") == trace_of(tmp_path / "straight" / "run")
    assert final_files(tmp_path / "run", 12) == final_files(tmp_path / "straight" / "run", 12)


def test_a_ternary_student_in_its_warm_up_writes_and_resumes_exactly(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*OWN, "student=bitnet", "student.bitnet.warmup_steps=8", "run.steps=10", "on_policy.lag=2"]
    assert run_here(workshop.settings(tmp_path / "straight", *arguments), ScriptedTargets()) == 0
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", lambda: StopAt(tmp_path / "run", 5))
        assert run_here(workshop.settings(tmp_path, *arguments), ScriptedTargets()) == loop.STOPPED
    assert run_here(workshop.settings(tmp_path, *arguments), ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "run") == trace_of(tmp_path / "straight" / "run")
    assert sum(line["on_policy"] for line in lines_of(tmp_path / "run")) == 5


def test_a_loss_at_the_students_own_likeliest_ids(workshop: Workshop, tmp_path: Path) -> None:
    lines = [*OWN, "on_policy.terms.reverse_kl.support=gather", "distillation.gather_k=8", "run.steps=4"]
    assert run_here(workshop.settings(tmp_path, *lines), ScriptedTargets()) == 0
    for line in lines_of(tmp_path / "run")[1::2]:
        assert line["on_policy"] == 1 and line["loss/on_policy_reverse_kl"] > 0


def test_a_tokenizer_without_an_end_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(workshop.student, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        if (folder / name).is_file():
            entries = json.loads((folder / name).read_text())
            entries.pop("eos_token", None)
            entries.pop("eos_token_id", None)
            (folder / name).write_text(json.dumps(entries))
    lines = [*OWN, f"student.checkpoint_path={folder}", "data.add_eos=false"]
    with pytest.raises(ValueError, match="would never end"):
        run_here(workshop.settings(tmp_path, *lines), ScriptedTargets())


def test_batches_behind_one_that_is_not_written_yet_are_asked_for(workshop: Workshop, tmp_path: Path) -> None:
    """With a depth of 4 the data's batches do not wait for the student's: they are asked for in another order."""
    targets = ScriptedTargets()
    assert run_here(workshop.settings(tmp_path, *OWN, "prefetch.depth=4"), targets) == 0
    # And none behind the run's last.
    assert sorted(targets.fetched) == list(range(12)) != targets.fetched


def test_a_batch_without_a_prompt_is_learnt_from_as_it_is(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [*OWN, "run.steps=2", "on_policy.share=1", "data.packing=none"]
    path = tmp_path / "short.jsonl"
    path.write_text('{"input_ids": [5]}\n{"input_ids": [6]}\n{"input_ids": [7, 8]}\n' * 9)
    for name in workshop.sources:
        lines += [f"data.sources.{name}.path={path}", f"data.sources.{name}.held_out_fraction=0"]
    assert run_here(workshop.settings(tmp_path, *lines), ScriptedTargets()) == 0
    for line in lines_of(tmp_path / "run"):
        said = "none of its 4 documents gives a prompt" in caplog.text
        assert line["on_policy"] or said
