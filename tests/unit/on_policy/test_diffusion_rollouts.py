"""A block-diffusion student learns from states of its own trajectory, and all that belongs to a run of one: it saves,
resumes to the last bit, is exported, read again, and writes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer import loop, main
from student_trainer.batch.batch import Placed, build_batch
from student_trainer.batch.view import ViewSeed
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.export import main as export
from student_trainer.cli.generate import Writer
from student_trainer.rollouts.block_decoding import _Filling
from student_trainer.rollouts.open import sampler_of
from student_trainer.rollouts.prompts import Prompt, rollout_batch
from student_trainer.settings import DiffusionSettings, StudentSettings
from student_trainer.students.diffusion_reader import left_to_write
from tests.models import VOCAB_SIZE, save_tiny_llama
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, run_here, trace_of

RUN = (
    "student=diffusion", "student.diffusion.block_size=4", "student.diffusion.threshold=0.05",
    "student.quantiser=bitnet", "student.quantisation.warmup_steps=2", "run.steps=6", "checkpoint.every=3",
    "evaluation.every=3", "evaluation.samples=1", "evaluation.sample_tokens=9", "distillation=tcs",
    "on_policy=reverse_kl", "on_policy.share=0.5", "on_policy.prompt_tokens=6", "on_policy.new_tokens=10",
    "teacher.sanity=off",
)  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def test_a_blocks_states_are_what_was_left_before_each_write_and_all_as_likely() -> None:
    written_T = np.array([0, 0, 3, 1, 3, 5, 9, 0])
    learnt_T = np.array([0, 0, 1, 1, 1, 1, 1, 0], bool)
    blocks_T = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    drawn: dict[str, int] = {}
    draw = np.random.default_rng(0)
    for _ in range(6000):
        masked_T = left_to_write(written_T, learnt_T, blocks_T, draw.random(8))
        drawn["".join(".x"[int(masked)] for masked in masked_T)] = 1 + drawn.get(
            "".join(".x"[int(m)] for m in masked_T), 0
        )
    # Of the first block "both" and "the one written last", of the second "all", "the last two", "the last".
    assert sorted(drawn) == sorted(a + b for a in ("..xx", "..x.") for b in ("xxx.", ".xx.", "..x."))
    assert all(abs(count - 1000) < 130 for count in drawn.values()), drawn


@pytest.mark.parametrize("family", ["in_place", "token_shift"])
def test_what_is_learnt_from_are_states_that_the_student_passed_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Any
) -> None:
    """With prompts that end inside a block: blocks are counted from the same place in rollout and training."""
    student = load_student(
        StudentSettings(
            checkpoint_path=str(save_tiny_llama(tmp_path / "model")), compute="float32", architecture="diffusion",
            diffusion=DiffusionSettings(block_size=4, family=family, threshold=0.02),
        ),
        torch.device("cpu"),
    )  # fmt: skip
    seen: set[tuple[int, ...]] = set()
    forward = _Filling.forward

    def watched(self: Any, start: int, stop: int, clean: bool, keep: bool) -> torch.Tensor:
        if not clean:
            for tokens_C, pad in zip(self.rows.tokens_PC, self.rows.pad_P, strict=True):
                seen.add((start - pad, *tokens_C[start:stop].tolist()))
        return forward(self, start, stop, clean, keep)

    monkeypatch.setattr(_Filling, "forward", watched)
    lengths = (5, 8, 3)
    prompts = [Prompt(row, 0, f"p{row}", np.arange(2, 2 + n, dtype=np.int32), row) for row, n in enumerate(lengths)]
    sampler = sampler_of(student, (), 0)
    assert sampler is not None
    samples = sampler.sample([p.ids_N for p in prompts], [p.seed for p in prompts], new_tokens=11)
    empty = build_batch(4, [[Placed(0, "x", np.zeros(2, np.int32), None)]] * 3, 24, 0, ("a",))
    batch = rollout_batch(empty, prompts, samples, 0)
    assert batch.rollout is not None and 0.3 < batch.rollout.means()["tokens_per_pass"] <= 4
    learnt = 0
    for seed in range(20):
        (view,) = student.views(batch, ViewSeed(seed))
        noisy_BT = view.input_ids_BT[:, :24].numpy()
        assert len(view.labels_N) == (noisy_BT == VOCAB_SIZE).sum() and view.weights_N is None
        for row, (n, sample) in enumerate(zip(lengths, samples, strict=True)):
            assert not (noisy_BT[row, :n] == VOCAB_SIZE).any()
            for start in range(n // 4 * 4, n + 11, 4):
                block = noisy_BT[row, start : start + 4]
                if start + 4 > n + 11 or not (block == VOCAB_SIZE).any():
                    continue
                state = (start, *block.tolist())
                if family == "token_shift" and block[0] == VOCAB_SIZE:
                    # The state before the first token, which is read off the pass before the block.
                    assert (block[max(0, n - start) :] == VOCAB_SIZE).all()
                else:
                    assert state in seen
                learnt += 1
            assert sample.written_at_N is not None
    assert learnt > 60
    again = rollout_batch(empty, prompts, samples, 0)
    (part,) = student.views(again.rows(1, 2), ViewSeed(3))
    (whole,) = student.views(again, ViewSeed(3))
    assert torch.equal(part.input_ids_BT, whole.input_ids_BT[1:2]), "two ranks draw the states that one draws"


def test_a_ternary_one_learns_from_its_own_text_resumes_is_exported_and_writes(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = workshop.settings(tmp_path / "whole", *RUN)
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    run = tmp_path / "whole" / "run"
    own = [line for line in lines_of(run) if line["on_policy"]]
    assert len(own) == 3 and all(line["loss/on_policy_reverse_kl"] > 0 for line in own)
    assert all(0.3 < line["on_policy/tokens_per_pass"] <= 4 for line in own)
    texts = lines_of(run, "samples.jsonl")
    assert len(texts) == 6 and all(text["written"] for text in texts)

    part = tmp_path / "part"
    shutil.copytree(run, part / "run")
    shutil.rmtree(part / "run" / "checkpoints" / "step-00000006")
    assert run_here(workshop.settings(part, *RUN), ScriptedTargets()) == loop.DONE
    assert trace_of(part / "run") == trace_of(run)
    assert final_files(part / "run", 6) == final_files(run, 6)
    assert lines_of(part / "run", "samples.jsonl") == texts

    out = tmp_path / "out"
    # Under the original names every norm keeps its own eps, and so the student its bits.
    assert export([str(run), "--format", "hf", "--architecture", "original", "--out", str(out), "--name", "tiny"]) == 0
    trained, reloaded = (Writer.load(folder, compute="float32") for folder in (run, out))
    prompts = ["The still", "def run(self"]
    one, two = (writer.write(prompts, new_tokens=12, threshold=0.05) for writer in (trained, reloaded))
    assert one == two and all(text.passes is not None and text.passes.denoising > 0 for text in one)
    drawn = [reloaded.write(prompts, new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    slow = reloaded.write(prompts, new_tokens=8, threshold=1.0)
    assert all(text.passes is not None and text.passes.denoising == text.tokens for text in slow if not text.ended)

    capsys.readouterr()
    command = ["generate", str(out), "--prompt", prompts[0], "--new-tokens", "12", "--json"]
    assert main.run(command) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["prompt"] == prompts[0] and line["tokens"] >= 1 and line["passes"]["denoising"] >= 1
    assert main.run([*command[:-1], "--threshold", "2"]) == 2
    assert "threshold: got 2.0, expected a probability" in capsys.readouterr().err


def test_a_causal_export_writes_too_and_has_no_threshold(tmp_path: Path) -> None:
    writer = Writer.load(save_tiny_llama(tmp_path / "model"), compute="float32")
    (written,) = writer.write(["The still"], new_tokens=5)
    assert 1 <= written.tokens <= 5 and written.passes is None
    with pytest.raises(ValueError, match="threshold is for block-diffusion students"):
        writer.write(["The still"], threshold=0.5)
    with pytest.raises(ValueError, match="has no tokens"):
        writer.write([""])
    with pytest.raises(ValueError, match="nowhere"):
        Writer.load(tmp_path / "nowhere")
