"""The gains that SubLN starts with: against the RMS of what the full-precision model's linears are given, what they are
good for, and which students get them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from student_trainer import loop
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import CausalDocuments, View
from student_trainer.calibration.sub_norms import calibrate_sub_norms, untrained_sub_norms
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.settings import QuantisationSettings, StudentSettings
from student_trainer.students.quant_linear import quant_linears, set_quantisation_blend
from student_trainer.students.student import Student
from tests.models import save_tiny_llama
from tests.trainer_run import ScriptedTargets, Workshop, run_here

CPU = torch.device("cpu")
NORMED = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3)


def student_of(model: Path, **quantisation: Any) -> Student:
    settings = StudentSettings(quantiser="bitnet", checkpoint_path=str(model), compute="float32",
                               quantisation=QuantisationSettings(**quantisation))  # fmt: skip
    return load_student(settings, CPU)


def text(rows: int = 4, length: int = 24, padded: int = 6) -> MicroBatch:
    """Random tokens, a document a row, and some padding."""
    ids_BT = torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(0))
    documents_BT = torch.zeros_like(ids_BT, dtype=torch.int32)
    documents_BT[:, length - padded :] = -1
    rows_N = (documents_BT >= 0).flatten().nonzero().flatten()
    none_N = torch.zeros(len(rows_N)).long()
    view = View(ids_BT, torch.arange(length).expand_as(ids_BT), CausalDocuments(documents_BT), rows_N,
                ids_BT.flatten()[rows_N], torch.arange(len(rows_N)))  # fmt: skip
    return MicroBatch(view, none_N, none_N, None)


def hidden_of(student: Student, micro: MicroBatch) -> Tensor:
    view = micro.view
    with torch.no_grad():
        return student.body(view.input_ids_BT, view.position_ids_BT, view.attention).flatten(0, 1)[view.rows_N]


def test_gains_are_the_typical_rms_of_what_the_model_gave_each_linear(model: Path) -> None:
    """By hand: the inputs of the model before it is quantised, real tokens alone, a token each by itself."""
    micro, found = text(), dict[str, list[float]]()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(NORMED):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: (args[0].pow(2).mean(-1) ** 0.5).flatten().tolist()})
            )
    with torch.no_grad():
        plain(input_ids=micro.view.input_ids_BT[:, :18])  # what comes before the padding
    student = student_of(model)
    gains = calibrate_sub_norms(student, [micro])
    assert set(gains) == set(found) and len(found) == 6
    for name, rms in found.items():
        expected = torch.tensor(rms, dtype=torch.float64).log().mean().exp().item()
        assert gains[name] == pytest.approx(expected, rel=1e-4)
        weight = student.model.get_submodule(f"{name}.rms_norm").weight
        assert torch.equal(weight, torch.full_like(weight, gains[name])) and weight.requires_grad
    assert not untrained_sub_norms(student.model), "they are not measured again behind themselves"


def test_the_model_computes_about_what_it_did_before_it_had_norms(model: Path) -> None:
    micro = text()
    without, ones, rms = student_of(model, sub_norm="none"), student_of(model), student_of(model)
    calibrate_sub_norms(rms, [micro, text(rows=2)])
    for student in (without, ones, rms):
        set_quantisation_blend(student.model, 0.0)
    exact_ND = hidden_of(without, micro)
    far, near = ((hidden_of(student, micro) - exact_ND).norm() / exact_ND.norm() for student in (ones, rms))
    assert near < 0.8 * far


def test_it_leaves_blend_hooks_and_mode_as_they_were(model: Path) -> None:
    student = student_of(model, warmup_steps=4)
    student.before_step(1)
    student.model.train()
    calibrate_sub_norms(student, [text()])
    assert {float(layer.quantisation_blend) for _, layer in quant_linears(student.model)} == {0.25}
    assert student.model.training and not any(m._forward_hooks for m in student.model.modules())


def test_text_that_no_norm_can_be_measured_by_is_an_error(model: Path) -> None:
    student = student_of(model)
    with torch.no_grad():
        for name, layer in quant_linears(student.model):
            if name.endswith("v_proj"):
                layer.weight.zero_()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj got only zeros as input.*sub_norm_start=ones"):
        calibrate_sub_norms(student, [text()])


@pytest.mark.parametrize("start", ["rms", "ones"])
def test_a_run_begins_with_them_and_the_next_one_keeps_what_was_learnt(
    workshop: Workshop, tmp_path: Path, start: str
) -> None:
    def gains(run: str, *more: str) -> Tensor:
        few = ("student=bitnet", f"run.id={run}", "run.steps=1", "checkpoint.every=1", "optim.learning_rate=1e-9")
        assert run_here(workshop.settings(tmp_path, *few, *more), ScriptedTargets()) == loop.DONE
        tensors = load_file(tmp_path / run / "checkpoints" / "step-00000001" / "model.safetensors")
        return torch.stack([value.mean() for name, value in sorted(tensors.items()) if "rms_norm" in name])

    first = gains("first", f"student.quantisation.sub_norm_start={start}")
    assert len(first) == 2 and bool((first - 1).abs().max() < 1e-6) == (start == "ones")
    second = gains("second", f"student.checkpoint_path={tmp_path / 'first'}")
    if start == "rms":
        torch.testing.assert_close(second, first, atol=1e-6, rtol=0)
