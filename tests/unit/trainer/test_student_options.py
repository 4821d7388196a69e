"""What a student may be computed or trained like: LoRA, checkpointed activations, bfloat16, compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer import loop
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.settings import LoRASettings, StudentSettings
from student_trainer.students.adapters.lora import add_lora, merge_lora
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, run_here, trace_of
from tests.unit.students.tiny import tiny_ids, tiny_model

LORA = ("student.lora.rank=4", "student.lora.alpha=8", "optim.learning_rate=3e-2")


def run(workshop: Workshop, root: Path, *overrides: str) -> Path:
    assert run_here(workshop.settings(root, *overrides), ScriptedTargets()) == loop.DONE
    return root / "run"


@pytest.fixture(scope="module")
def adapted(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(workshop, tmp_path_factory.mktemp("adapted"), *LORA)


def test_lora_trains_its_additions_and_nothing_else(workshop: Workshop, adapted: Path) -> None:
    student = load_student(StudentSettings(checkpoint_path=str(adapted)), torch.device("cpu"))
    before = AutoModelForCausalLM.from_pretrained(workshop.student).state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in student.tensors().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    additions = {name: tensor for name, tensor in after.items() if "lora_B" in name}
    assert len(additions) == 7 and all(bool(tensor.any()) for tensor in additions.values())
    lines = lines_of(adapted)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_a_lora_run_resumes_bit_for_bit(workshop: Workshop, adapted: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    again = run(workshop, tmp_path, *LORA)
    assert trace_of(again) == trace_of(adapted)
    assert final_files(again, 12) == final_files(adapted, 12)


@torch.no_grad()
def test_merged_it_is_a_plain_model_of_the_same_function() -> None:
    model: Any = tiny_model("llama")
    names = set(model.state_dict())
    plain = model(input_ids=tiny_ids(), use_cache=False).logits
    add_lora(model, LoRASettings(rank=3, alpha=6, targets=("q_proj", "down_proj")))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name and ("q_proj" in name or "down_proj" in name) for name in trained)
    assert torch.equal(model(input_ids=tiny_ids(), use_cache=False).logits, plain), "untrained they change nothing"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    changed = model(input_ids=tiny_ids(), use_cache=False).logits
    assert not torch.allclose(changed, plain, atol=0.1)
    merged = merge_lora(model)
    assert set(merged.state_dict()) == names and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged(input_ids=tiny_ids(), use_cache=False).logits, changed, rtol=1e-4, atol=1e-4)


def test_targets_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student.lora.targets: .*w_pack"):
        add_lora(tiny_model("llama"), LoRASettings(rank=4, targets=("w_pack",)))


def test_checkpointed_activations_give_the_same_run_bit_for_bit(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    again = run(workshop, tmp_path, "student.gradient_checkpointing=true")
    assert trace_of(again) == trace_of(straight)
    assert final_files(again, 12) == final_files(straight, 12)


def test_bfloat16_computes_near_it_and_keeps_float32_weights(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    near = run(workshop, tmp_path, "student.compute=bfloat16")
    losses = [[line["loss"] for line in lines_of(folder)] for folder in (straight, near)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]
    tensors = load_student(StudentSettings(checkpoint_path=str(near)), torch.device("cpu")).tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_to_rounding(workshop: Workshop, straight: Path, tmp_path: Path) -> None:
    compiled = run(workshop, tmp_path, "student.compile=true")
    losses = [[line["loss"] for line in lines_of(folder)] for folder in (straight, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
