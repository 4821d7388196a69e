"""A corrected student for others: a dense base with its corrections beside it, which peft loads, or with them added in;
each linear with a rank of its own, and the bits that they take on the card.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from student_trainer.cli import export as cli_export
from student_trainer.export.card import ModelCard
from student_trainer.export.check import compare_logits
from student_trainer.export.dense import export_dense
from student_trainer.export.hf import export_hf
from student_trainer.settings import LRCSettings, StudentSettings
from student_trainer.students.adapters.low_rank import corrections, read_peft
from student_trainer.students.load import adapt
from student_trainer.students.pretrained import load_quantised
from student_trainer.students.quant_linear import quant_linears, quantise
from tests.trainer_run import Workshop, run_here
from tests.unit.students.tiny import tiny_ids, tiny_model

CARD = ModelCard("tiny", "tiny-base", "", "")


def corrected(quantiser: str = "rtn", **how: Any) -> Any:
    """A tiny student whose corrections do much, of ranks 3 and 6."""
    model = quantise(tiny_model("llama"), quantiser, sub_norm="none", **how)
    settings = StudentSettings(quantiser=quantiser, adapter="lrc", lrc=LRCSettings(rank=0.1))
    adapt(model, settings)
    with torch.no_grad():
        for _, layer in quant_linears(model):
            layer.correction.lora_B.weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
    assert {len(each.a_RI) for each in corrections(model).values()} == {3, 6}
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> np.ndarray:
    return model(input_ids=tiny_ids(), use_cache=False).logits.float().numpy()


def test_peft_over_the_dense_base_gives_the_students_logits(tmp_path: Path) -> None:
    model = corrected(bits=2)
    report = export_dense(model, None, tmp_path / "out", CARD, adapter="beside")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    alone = logits(base)
    again = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    np.testing.assert_allclose(logits(again), logits(model), rtol=0, atol=1e-4)
    assert compare_logits(logits(model), alone).difference > 0.1, "without them it is another model"
    assert report.stands_alone
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDER), FOLDER + "/adapter")' in card


def test_merged_it_is_a_plain_model_of_the_same_function(tmp_path: Path) -> None:
    model = corrected(bits=4, group_size=32)
    export_dense(model, None, tmp_path / "out", CARD)
    assert not (tmp_path / "out" / "adapter").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(logits(again), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("activations", [None, 4])
def test_the_latent_weights_and_corrections_are_read_again(tmp_path: Path, activations: int | None) -> None:
    model = corrected(bits=3, quantise_activations=activations is not None, activation_bits=activations)
    export_hf(model, None, tmp_path / "out", CARD)
    again = load_quantised(str(tmp_path / "out")).eval()
    assert compare_logits(logits(model), logits(again)).difference < 1e-2
    found = read_peft(tmp_path / "out" / "adapter")
    for name, correction in corrections(model).items():
        assert torch.equal(found[name].a_RI, correction.a_RI) and found[name].alpha == correction.alpha
    if activations is not None:
        with pytest.raises(ValueError, match="activations are rounded to int4, a plain model's are not"):
            export_dense(model, None, tmp_path / "dense", CARD)


def test_the_card_says_how_many_bits_a_weight_takes(tmp_path: Path) -> None:
    """16 r (m + n) / (m n) beside the base's own, over all linears."""
    model = corrected(bits=4, group_size=32)
    export_dense(model, None, tmp_path / "out", CARD)
    packed, effective = re.search(  # type: ignore[union-attr]
        r"takes ([\d.]+) bits when packed, including scales, and ([\d.]+) with the adapter",
        (tmp_path / "out" / "README.md").read_text(),
    ).groups()
    ranks = {name: len(each.a_RI) for name, each in corrections(model).items()}
    shapes = {name: tuple(layer.weight.shape) for name, layer in quant_linears(model)}
    added = sum(16 * ranks[name] * (m + n) for name, (m, n) in shapes.items()) / sum(m * n for m, n in shapes.values())
    assert float(packed) == pytest.approx(4 + 20 / 32, abs=5e-3)
    assert float(effective) == pytest.approx(4 + 20 / 32 + added, abs=5e-3)


def test_a_calibrated_run_is_exported_by_the_command(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = workshop.settings(
        tmp_path, "student=lrc", "student.lrc.sequences=4", "teacher=none", "distillation=cross_entropy", "run.steps=0",
        "student.quantisation.bits=2",
    )  # fmt: skip
    assert run_here([each for each in given if not each.startswith("teacher.")]) == 0
    run = tmp_path / "run"
    for adapter in ("merged", "beside"):
        out = tmp_path / adapter
        assert cli_export.main([str(run), "--format", "dense", "--adapter", adapter, "--out", str(out)]) == 0
        assert (out / "adapter").exists() is (adapter == "beside")
    said = capsys.readouterr().out
    assert said.count("reloaded with transformers alone") == 2
