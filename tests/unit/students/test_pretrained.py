"""Students loaded from disk: full precision, transformers' own BitNet, and our exports."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.export.card import ModelCard
from student_trainer.export.hf import export_bitnet, export_hf
from student_trainer.students.pretrained import load_quantised
from student_trainer.students.quant_linear import quant_linears
from tests.unit.students.tiny import convert_to_bitnet, tiny_ids, tiny_model

CARD = ModelCard("tiny", "tiny-base", "a teacher", "sha256:0")
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


load_bitnet = partial(load_quantised, quantiser="bitnet")


@pytest.fixture(autouse=True)
def eager_transformers():
    with torch.compiler.set_stance("force_eager"):
        yield


def save(model: Any, folder: Path, quantisation: dict[str, Any] | None = None) -> str:
    """As transformers saves it; `quantisation` is what the bf16 checkpoint of BitNet 2B4T has in its config."""
    if quantisation:
        model.config.quantization_config = quantisation
    model.config.save_pretrained(folder)
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}, folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_full_precision_checkpoint_becomes_a_student(tmp_path: Path, family: str) -> None:
    original = tiny_model(family)
    student = load_bitnet(save(original, tmp_path)).eval()
    expected = convert_to_bitnet(original)
    assert torch.equal(student(tiny_ids()).logits, expected(tiny_ids()).logits)


def test_bitnet_latent_checkpoint_is_trainable_and_equals_transformers(tmp_path: Path) -> None:
    path = save(tiny_model("bitnet", hidden_act="relu2"), tmp_path, ONLINE)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = load_bitnet(path)
    ids_BT = tiny_ids()
    gradients = []
    for model in (theirs, ours):
        output = model(ids_BT, labels=ids_BT)
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
    assert torch.equal(theirs(ids_BT).logits, ours(ids_BT).logits)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_bfloat16_latent_checkpoint_loads_in_the_dtype_asked_for(tmp_path: Path) -> None:
    path = save(tiny_model("bitnet", dtype=torch.bfloat16), tmp_path, ONLINE)
    for dtype in (torch.float32, torch.bfloat16):
        student = load_bitnet(path, dtype=dtype)
        assert {p.dtype for p in student.parameters()} == {dtype}


@pytest.mark.parametrize("architecture", ["auto", "original"])
@pytest.mark.parametrize(
    ("family", "sub_norm"), [("llama", "output"), ("qwen3", "output"), ("qwen2", "all"), ("qwen3", "none")]
)
def test_hf_export_comes_back_as_the_same_student(
    tmp_path: Path, family: str, sub_norm: Any, architecture: Any
) -> None:
    """Stage 3 follows stage 2 by a path."""
    student = convert_to_bitnet(tiny_model(family), sub_norm=sub_norm)
    for _, layer in quant_linears(student):
        if layer.rms_norm is not None:
            torch.nn.init.uniform_(layer.rms_norm.weight, 0.5, 1.5)
    export_hf(student, None, tmp_path / "out", CARD, architecture=architecture)
    again = load_bitnet(str(tmp_path / "out")).eval()
    torch.testing.assert_close(again(tiny_ids()).logits, student(tiny_ids()).logits, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in again.parameters())
    if architecture == "original":
        assert again.state_dict().keys() == student.state_dict().keys()


def test_packed_weights_are_refused_as_a_student(tmp_path: Path) -> None:
    export_bitnet(convert_to_bitnet(tiny_model("llama")), None, tmp_path / "out", CARD)
    with pytest.raises(ValueError, match=r"holds packed ternary weights .* cannot be trained"):
        load_bitnet(str(tmp_path / "out"))


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    path = save(tiny_model("llama"), tmp_path, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantised with 'gptq'"):
        load_bitnet(path)


def test_settings_that_contradict_the_checkpoint_are_refused(tmp_path: Path) -> None:
    export_hf(convert_to_bitnet(tiny_model("qwen3"), eps=1e-6), None, tmp_path / "out", CARD)
    path = str(tmp_path / "out")
    with pytest.raises(ValueError, match="trained with sub_norm=output, got all"):
        load_bitnet(path, sub_norm="all")
    with pytest.raises(ValueError, match="trained with eps=1e-06, got 1e-08"):
        load_bitnet(path, eps=1e-8)
    assert len(list(quant_linears(load_bitnet(path, sub_norm="output", eps=1e-6)))) == 14


def test_checkpoint_without_a_norm_or_without_its_file_is_refused(tmp_path: Path) -> None:
    export_hf(convert_to_bitnet(tiny_model("qwen3")), None, tmp_path / "out", CARD)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.rms_norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit.*layers\.1\.mlp\.down_proj\.rms_norm"):
        load_bitnet(str(tmp_path / "out"))
    file.unlink()
    with pytest.raises(ValueError, match=r"the weights file model\.safetensors is missing"):
        load_bitnet(str(tmp_path / "out"))
