"""Exports opened again, where nothing of ours can be imported, and the refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from student_trainer.export import check as export_check
from student_trainer.export.bitnet import as_architecture
from student_trainer.export.card import ModelCard
from student_trainer.export.check import compare_logits, transformers_logits
from student_trainer.export.export import EXPORTS
from student_trainer.export.expression import CannotExpressError
from student_trainer.export.hf import export_bitnet, export_hf
from student_trainer.students.quant_linear import quant_linears, set_quantisation_blend
from student_trainer.students.quantisers.bitnet import BITNET
from tests.unit.students.tiny import convert_to_bitnet, spread_weights, ternary_codes, tiny_config, tiny_ids, tiny_model

CARD = ModelCard(
    name="tiny-student", base_model="tiny/base", teacher="tiny/teacher", teacher_fingerprint="sha256:abc",
    data=("prose: 10 documents",), figures={"cross-entropy": "3.21"}, config="steps: 7\n",
)  # fmt: skip


# The formats for a ternary student with SubLN and rounded activations.
HOLD_IT = sorted(BITNET.exports - {"dense"})


def student(family: str = "llama", sub_norm: Any = "output", eps: float | None = None, **overrides: Any) -> Any:
    """A ternary student whose SubLN gains are not 1."""
    torch.manual_seed(0)
    conversion = {key: overrides.pop(key) for key in ("quantise_activations",) if key in overrides}
    model = convert_to_bitnet(tiny_model(family, **overrides), sub_norm=sub_norm, eps=eps, **conversion)
    for _, layer in quant_linears(model):
        if layer.rms_norm is not None:
            torch.nn.init.uniform_(layer.rms_norm.weight, 0.5, 1.5)
    return model.eval()


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(tiny_ids()).logits.numpy()


EXPRESSIBLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "output", {}),
    "untied": ("llama", "output", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "rope": ("llama", "output", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}),
    "relu2": ("bitnet", "output", {"hidden_act": "relu2"}),
    "all": ("qwen3", "all", {}),
    "none": ("qwen3", "none", {"head_dim": 32}),
}
CASES = [(kind, name) for kind in ("hf", "bitnet") for name in EXPRESSIBLE]


def expressible(name: str) -> Any:
    family, sub_norm, overrides = EXPRESSIBLE[name]
    return student(family, sub_norm, **overrides)


@pytest.fixture(scope="module")
def opened_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], np.ndarray]:
    """Logits of every export in one process without our packages: its start is what takes time."""
    root = tmp_path_factory.mktemp("exports")
    for kind, name in CASES:
        assert EXPORTS[kind](expressible(name), None, root / f"{kind}-{name}", CARD).stands_alone
    export_hf(student("qwen3"), None, root / "hf-plain", CARD)
    cases = [*CASES, ("hf", "plain")]
    found = transformers_logits([root / f"{kind}-{name}" for kind, name in cases], tiny_ids().numpy())
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_transformers_alone_gives_the_same_logits(opened_elsewhere: Any, kind: str, name: str) -> None:
    model, theirs = expressible(name), opened_elsewhere[kind, name]
    comparison = compare_logits(logits(model), theirs)
    assert comparison.difference < 1e-2 and comparison.agreement > 0.95, comparison
    # Not because the two are much alike anyway: latent weights without quantisers are far away.
    set_quantisation_blend(model, 0.0)
    assert compare_logits(logits(model), theirs).difference > 0.2


def test_transformers_compiled_layers_give_the_same_logits(tmp_path: Path) -> None:
    model = student()
    export_bitnet(model, None, tmp_path / "out", CARD)
    (theirs,) = transformers_logits([tmp_path / "out"], tiny_ids().numpy(), compiled=True)
    assert compare_logits(logits(model), theirs).difference < 1e-2


@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-5, 1e-3])
def test_sub_norm_eps_is_folded_into_the_weights_exactly(eps: float) -> None:
    """One eps has to serve all norms there; with small activations a wrong one would show."""
    model = student(eps=eps)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm.weight",)):
                parameter.mul_(0.02)
    for _, layer in quant_linears(model):
        layer.activation_quantiser = None
    expression = as_architecture(model)
    rebuilt = AutoModelForCausalLM.from_config(expression.config)
    rebuilt.load_state_dict(expression.weights, strict=False)
    rebuilt.tie_weights()
    convert_to_bitnet(rebuilt, quantise_activations=False)
    assert compare_logits(logits(model), logits(rebuilt.eval())).difference < 1e-4
    wrong = student(eps=1e-2)
    wrong.load_state_dict(model.state_dict())
    for _, layer in quant_linears(wrong):
        layer.activation_quantiser = None
    assert compare_logits(logits(model), logits(wrong)).difference > 1e-2


@pytest.mark.parametrize("kind", ["hf", "bitnet"])
def test_classifier_with_norms_everywhere_loads_in_transformers(tmp_path: Path, kind: str) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config("qwen3", num_labels=3))
    spread_weights(model)
    convert_to_bitnet(model.eval(), sub_norm="all")
    assert EXPORTS[kind](model, None, tmp_path / "out", CARD).stands_alone
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(again(tiny_ids()).logits, model(tiny_ids()).logits, rtol=1e-4, atol=1e-4)


def test_packed_file_holds_the_codes_four_to_a_byte(tmp_path: Path) -> None:
    model = student()
    export_bitnet(model, None, tmp_path / "out", CARD)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    codes_OI, scale = ternary_codes(model.model.layers[1].mlp.down_proj)
    packed = tensors["model.layers.1.mlp.down_proj.weight"]
    assert packed.dtype == torch.uint8 and packed.shape == (16, 128)
    unpacked = torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])
    assert torch.equal(unpacked, codes_OI)
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight_scale"], scale.reshape(1))
    assert not any("blend" in name or "rms_norm" in name for name in tensors)


def test_hf_of_what_transformers_lacks_is_latent_weights_and_says_so(tmp_path: Path, opened_elsewhere: Any) -> None:
    model = student("qwen3")
    report = export_hf(model, None, tmp_path / "out", CARD)
    assert not report.stands_alone and report.architecture == "Qwen3ForCausalLM"
    assert any("QK-norm" in note and "not this model's" in note for note in report.notes)
    assert report.notes[0] in (tmp_path / "out" / "README.md").read_text()
    latent = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(latent["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
    plain = opened_elsewhere["hf", "plain"]
    assert plain.shape == logits(model).shape
    assert compare_logits(logits(model), plain).difference > 0.2


REFUSED = [
    ("qwen3", {}, "QK-norm"),
    ("qwen2", {}, "biases in k_proj, q_proj, v_proj"),
    ("llama", {"mlp_bias": True}, "biases in down_proj, gate_proj, up_proj"),
    ("llama", {"head_dim": 32}, "4 heads of width 32 make 128, not 64"),
    ("llama", {"sliding_window": 8}, "sliding-window attention"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8}, "sliding-window attention"),
    ("llama", {"quantise_activations": False}, "activations are not quantised"),
    ("qwen2", {"sub_norm": "all"}, "have a bias, which would be scaled too"),
    ("qwen3", {"sub_norm": "none", "intermediate_size": 130}, "not a multiple of 4"),
    ("qwen3", {"sub_norm": "all", "quantise_activations": False}, "activations are not quantised"),
]


@pytest.mark.parametrize(("family", "overrides", "reason"), REFUSED)
def test_bitnet_refuses_by_name_and_points_to_hf(
    tmp_path: Path, family: str, overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CannotExpressError, match=reason) as caught:
        export_bitnet(student(family, **overrides), None, tmp_path / "out", CARD)
    assert "use --format hf" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_architecture_that_only_looks_like_llama_is_caught_by_its_logits() -> None:
    model = student()
    model.model.layers[1].self_attn.scaling *= 1.2
    with pytest.raises(CannotExpressError, match="llama computes something else: logits differ by"):
        as_architecture(model)


@pytest.mark.parametrize("kind", HOLD_IT)
def test_exports_refuse_an_unfinished_warmup_and_an_existing_folder(tmp_path: Path, kind: str) -> None:
    model = student()
    set_quantisation_blend(model, 0.5)
    with pytest.raises(ValueError, match=r"warm-up is at 0\.500"):
        EXPORTS[kind](model, None, tmp_path / "out", CARD)
    set_quantisation_blend(model, 1.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="already exists"):
        EXPORTS[kind](model, None, tmp_path / "out", CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", HOLD_IT)
def test_exporting_leaves_the_student_as_it_was(tmp_path: Path, kind: str) -> None:
    model = student().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    EXPORTS[kind](model, None, tmp_path / "out", CARD)
    assert model.training and all(layer.activation_quantiser is not None for _, layer in quant_linears(model))
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_failed_write_leaves_no_folder(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        export_hf(student(), Broken(), tmp_path / "out", CARD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", HOLD_IT)
def test_card_names_data_teacher_figures_config_and_how_to_load(tmp_path: Path, kind: str) -> None:
    report = EXPORTS[kind](student(), None, tmp_path / "out", CARD)
    card = (report.folder / "README.md").read_text()
    for fact in (
        "tiny/base",
        "tiny/teacher",
        "sha256:abc",
        "prose: 10 documents",
        "| cross-entropy | 3.21 |",
        "steps: 7",
    ):
        assert fact in card
    assert ("llama-cli -m tiny-student.gguf" if kind == "gguf" else "AutoModelForCausalLM.from_pretrained") in card
    assert all(note in card for note in report.notes)
    assert report.num_bytes == sum(file.stat().st_size for file in report.folder.iterdir())


def test_card_without_figures_says_that_none_were_measured(tmp_path: Path) -> None:
    card = ModelCard("a", "b", "c", "d")
    export_hf(student(), None, tmp_path / "out", card)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "None were measured." in text and text.count("Not recorded.") == 2


def test_tokenizer_goes_with_the_model(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for kind in ("hf", "bitnet"):
        EXPORTS[kind](student(), tokenizer, tmp_path / kind, CARD)
        again = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert again("def f(x): return 12")["input_ids"] == tokenizer("def f(x): return 12")["input_ids"]


def test_compare_logits_tells_equal_from_different() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 4, 8, 50))
    same = compare_logits(one, one + 3.0)
    assert same.kl == pytest.approx(0.0, abs=1e-12) and same.agreement == 1.0
    other = compare_logits(one, two)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (one, two))
    assert other.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean()) and other.agreement < 0.5
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_logits(one, two[:2])


def test_an_export_that_cannot_be_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "_SCRIPT", "raise SystemExit('no such weights')")
    with pytest.raises(RuntimeError, match="transformers could not run the export: no such weights"):
        transformers_logits([Path("nowhere")], tiny_ids().numpy())
