"""Packed codes and dense weights: the layout of the bytes, readers in numpy and torch, and stock transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from student_trainer.export import packed_reader
from student_trainer.export.bits import bits_a_weight
from student_trainer.export.dense import export_dense
from student_trainer.export.export import EXPORTS
from student_trainer.export.expression import CannotExpressError
from student_trainer.export.hf import export_hf
from student_trainer.export.packed import export_packed, load_packed, pack, unpack
from student_trainer.export.packed_reader import read_packed
from student_trainer.students.adapters.low_rank import LowRank
from student_trainer.students.pretrained import load_quantised
from student_trainer.students.quant_linear import quant_linears, quantise, set_quantisation_blend
from tests.unit.students.tiny import tiny_ids, tiny_model
from tests.unit.test_export import CARD, logits

QUANTISED: dict[str, dict[str, Any]] = {
    "seq2": {"quantiser": "seq2"},
    "W1": {"quantiser": "fairy2i", "stages": 1},
    "W2": {"quantiser": "fairy2i"},
    "W2, SubLN, int8": {"quantiser": "fairy2i", "sub_norm": "output", "quantise_activations": True},
}


def student(name: str, *, corrected: bool = False, **shape: Any) -> Any:
    """Rows of 54 that four codes a byte do not fill, and alphas that have moved."""
    model = quantise(tiny_model("llama", intermediate_size=108, **shape), **QUANTISED[name])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, layer in quant_linears(model):
            if hasattr(layer, "alpha"):
                layer.alpha.mul_(0.5 + torch.rand(layer.alpha.shape, generator=generator))
            if corrected:
                layer.correction = LowRank(layer.in_features, layer.out_features, 3, 6, layer.weight)
                layer.correction.lora_B.weight.normal_(std=0.05, generator=generator)
    return model.eval()


def multiplied_by(model: Any) -> dict[str, torch.Tensor]:
    one = torch.ones(())
    return {f"{name}.weight": layer.weight_quantiser.weight(layer, one) for name, layer in quant_linears(model)}


@pytest.mark.parametrize("width", [1, 4, 54, 64])
def test_four_codes_lie_in_a_byte_the_first_in_the_lowest_bits(width: int) -> None:
    codes = torch.randint(4, (3, 2, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-width // 4))
    assert torch.equal(unpack(packed, width), codes)
    assert np.array_equal(packed_reader.unpack(packed.numpy(), width), codes.numpy())
    assert pack(torch.tensor([[0, 1, 2, 3, 3]], dtype=torch.uint8)).tolist() == [[0b11_10_01_00, 0b11]]


@pytest.mark.parametrize("name", QUANTISED)
def test_readers_in_numpy_and_torch_give_the_weights_to_the_bit(tmp_path: Path, name: str) -> None:
    model = student(name)
    report = export_packed(model, None, tmp_path / "out", CARD)
    assert (report.format, report.stands_alone) == ("packed", False)
    by_numpy, opened = read_packed(tmp_path / "out"), load_packed(tmp_path / "out")
    for weight_name, expected in multiplied_by(model).items():
        assert np.array_equal(by_numpy[weight_name], expected.detach().numpy()), weight_name
        assert torch.equal(opened.get_parameter(weight_name), expected)
    others = {
        key: tensor for key, tensor in model.state_dict().items() if key in by_numpy and key not in multiplied_by(model)
    }
    assert len(others) >= 6 and all(np.array_equal(by_numpy[key], tensor.numpy()) for key, tensor in others.items())
    assert np.array_equal(logits(opened), logits(model))
    set_quantisation_blend(model, 0.0)
    assert not np.allclose(logits(opened), logits(model), atol=1e-2)


def test_files_of_codes_have_the_size_that_the_card_says(tmp_path: Path) -> None:
    for name, bits in (("seq2", 2), ("W1", 1), ("W2", 2)):
        model = student(name)
        export_packed(model, None, tmp_path / name, CARD)
        tensors = load_file(tmp_path / name / "packed.safetensors")
        weights = sum(layer.weight.numel() for _, layer in quant_linears(model))
        stored = sum(t.nbytes for key, t in tensors.items() if key.endswith((".codes", ".scales")))
        found = bits_a_weight(model)
        assert found is not None and found.packed == found.with_adapter
        # Rows of 54 codes end in a byte that is half empty.
        assert bits < found.packed <= 8 * stored / weights < 1.02 * found.packed
        assert f"takes {found.packed:.2f} bits when packed" in (tmp_path / name / "README.md").read_text()


def test_bits_a_weight_by_hand() -> None:
    """T bits and 4 T scales a matrix; two bits and a scale a row; an adapter's numbers at 16 bits."""
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (108, 64), (108, 64), (64, 108)] * 2
    weights = sum(rows * columns for rows, columns in shapes)
    for name, expected in (
        ("W1", 1 + 14 * 4 * 32 / weights),
        ("W2", 2 + 14 * 8 * 32 / weights),
        ("seq2", 2 + sum(rows for rows, _ in shapes) * 32 / weights),
    ):
        found = bits_a_weight(student(name, corrected=True))
        assert found is not None and found.packed == pytest.approx(expected)
        added = sum(3 * (rows + columns) for rows, columns in shapes)
        assert found.with_adapter == pytest.approx(expected + 16 * added / weights)
    assert bits_a_weight(tiny_model("llama")) is None
    square = quantise(tiny_model("llama", num_key_value_heads=4, intermediate_size=64), "seq2")
    for _, layer in quant_linears(square):
        layer.correction = LowRank(64, 64, 6, 6, layer.weight)
    found = bits_a_weight(square)
    assert found is not None and found.with_adapter - found.packed == pytest.approx(16 * 2 * 6 / 64)


@pytest.mark.parametrize("name", ["seq2", "W1", "W2"])
@pytest.mark.parametrize("corrected", [False, True])
def test_stock_transformers_gives_the_dense_export_the_students_logits(
    tmp_path: Path, name: str, corrected: bool
) -> None:
    model = student(name, corrected=corrected, tie_word_embeddings=not corrected)
    report = export_dense(model, None, tmp_path / "out", CARD)
    assert report.stands_alone and report.architecture == "LlamaForCausalLM"
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    # An adapter that is added in is summed in another order.
    np.testing.assert_allclose(logits(again.eval()), logits(model), rtol=0, atol=1e-4 if corrected else 1e-6)
    assert (tmp_path / "out" / "adapter").exists() is False
    assert not hasattr(again.config, "student_quantisation")


@pytest.mark.parametrize("name", ["seq2", "W2"])
def test_a_packed_export_keeps_its_adapter_beside_it(tmp_path: Path, name: str) -> None:
    model = student(name, corrected=True)
    export_packed(model, None, tmp_path / "out", CARD)
    assert (tmp_path / "out" / "adapter").is_dir()
    assert " with the adapter, in 16 bits" in (tmp_path / "out" / "README.md").read_text()
    np.testing.assert_allclose(logits(load_packed(tmp_path / "out")), logits(model), atol=1e-6)


def test_the_hf_export_trains_on_and_keeps_alphas_and_stages(tmp_path: Path) -> None:
    for name in ("seq2", "W1"):
        model = student(name)
        export_hf(model, None, tmp_path / name, CARD)
        again = load_quantised(str(tmp_path / name)).eval()
        assert np.array_equal(logits(again), logits(model))
        assert all(parameter.requires_grad for parameter in again.parameters())
        with pytest.raises(ValueError, match=r"was trained with stages=(1|None), got 2; leave it out"):
            load_quantised(str(tmp_path / name), stages=2)


def test_bfloat16_is_written_as_float32_for_numpy(tmp_path: Path) -> None:
    model = student("seq2").bfloat16()
    export_packed(model, None, tmp_path / "out", CARD)
    by_numpy = read_packed(tmp_path / "out")
    assert {tensor.dtype for tensor in by_numpy.values()} == {np.dtype(np.float32)}
    assert np.array_equal(by_numpy["model.norm.weight"], model.model.norm.weight.detach().float().numpy())


def test_what_a_plain_model_lacks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CannotExpressError, match=r"SubLN \(sub_norm 'output'\).*rounded to int8.*use --format hf"):
        export_dense(student("W2, SubLN, int8"), None, tmp_path / "out", CARD)
    ternary = quantise(tiny_model("llama"), "bitnet", sub_norm="none", quantise_activations=False)
    assert export_dense(ternary, None, tmp_path / "ternary", CARD).stands_alone
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ternary").eval()
    np.testing.assert_allclose(logits(again), logits(ternary.eval()), atol=1e-6)
    with pytest.raises(ValueError, match=r"format packed can't hold this student \(student.quantiser is bitnet\)"):
        export_packed(ternary, None, tmp_path / "packed", CARD)
    set_quantisation_blend(ternary, 0.5)
    with pytest.raises(ValueError, match=r"the quantisation warm-up is at 0\.500"):
        EXPORTS["dense"](ternary, None, tmp_path / "half", CARD)


def test_packed_folders_are_no_checkpoints(tmp_path: Path) -> None:
    export_packed(student("W2"), None, tmp_path / "out", CARD)
    with pytest.raises(ValueError, match=r"holds packed weights: their latent weights are gone.*format 'hf'"):
        load_quantised(str(tmp_path / "out"), "fairy2i")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    export_hf(student("W2"), None, tmp_path / "hf", CARD)
    for read in (read_packed, load_packed):
        with pytest.raises(ValueError, match=r"holds no packed student of version 1"):
            read(tmp_path / "hf")


def test_the_numpy_reader_needs_no_torch(tmp_path: Path) -> None:
    export_packed(student("W2"), None, tmp_path / "out", CARD)
    file = Path(packed_reader.__file__)
    script = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.path.insert(0, {str(file.parent)!r})\n"
        f"from {file.stem} import read_packed\n"
        f"print(len(read_packed({str(tmp_path / 'out')!r})))"
    )
    found = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) == len(read_packed(tmp_path / "out"))


def test_ids_are_where_the_models_differ() -> None:
    """The comparisons above are of logits that quantisation moves."""
    exact, quantised = tiny_model("llama", intermediate_size=108), student("W1")
    with torch.no_grad():
        assert (exact(tiny_ids()).logits - quantised(tiny_ids()).logits).abs().max() > 0.1
