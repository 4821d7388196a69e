"""QK-clip: the largest logit comes to tau, and nothing else happens."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma3TextConfig, Olmo2Config, Phi3Config

from student_trainer.optim.qk_clip import ClipReport, QKClip
from student_trainer.students.adapters.low_rank import LowRank
from student_trainer.students.quant_linear import quant_linears
from student_trainer.students.quantisers.bitnet import BitNet
from tests.unit.students.tiny import convert_to_bitnet, spread_weights, ternary_codes, tiny_ids, tiny_model

TINY = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def one_layer(family: str) -> Any:
    """One layer, so that a second pass sees the same input and differs by the clip alone; heads of unlike size."""
    model = tiny_model(family, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.view(4, -1).mul_(torch.tensor([[1.0], [9.0], [4.0], [2.0]]))
    return model


@torch.no_grad()
def seen(clip: QKClip, model: Any) -> Tensor:
    """The heads' largest logits of a pass over two micro batches; the monitor keeps them."""
    for seed in (1, 2):
        with clip.monitor.watch():
            model.model(input_ids=tiny_ids(seed=seed), use_cache=False)
    return clip.monitor.largest()[0]


@torch.no_grad()
def probed(clip: QKClip, model: Any) -> Tensor:
    largest_H = seen(clip, model)
    clip.monitor.reset()
    return largest_H


@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_largest_logit_of_a_group_comes_to_tau_and_other_groups_are_left_alone(family: str, alpha: float) -> None:
    model = one_layer(family)
    before = probed(QKClip(model), model)
    # Between the two groups: heads 0 and 1 share a key head and go over, heads 2 and 3 don't.
    first, second = before[:2].max().item(), before[2:].max().item()
    assert first > 1.2 * second
    tau = math.sqrt(first * second)
    untouched = copy.deepcopy(model.state_dict())
    clip = QKClip(model, tau, alpha)
    seen(clip, model)
    report = clip.apply()
    assert report == ClipReport(pytest.approx(first), 2, pytest.approx(tau / first))
    after = probed(clip, model)
    torch.testing.assert_close(after[:2].max().item(), tau, rtol=1e-5, atol=0)
    torch.testing.assert_close(after[:2], before[:2] * (tau / first), rtol=1e-5, atol=1e-6)
    assert torch.equal(after[2:], before[2:])
    gamma = tau / first
    for name, tensor in model.state_dict().items():
        expected = untouched[name].clone()
        if "q_proj" in name:
            expected[:32] *= gamma**alpha
        if "k_proj" in name:
            expected[:16] *= gamma ** (1 - alpha)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=0)
        kept = 32 if "q_proj" in name else 16 if "k_proj" in name else 0
        assert torch.equal(tensor[kept:], untouched[name][kept:])


def test_below_tau_no_bit_changes() -> None:
    model = one_layer("qwen2")
    untouched = copy.deepcopy(model.state_dict())
    clip = QKClip(model, tau=1e4)
    largest_H = seen(clip, model)
    assert clip.apply() == ClipReport(largest_H.max().item(), 0, 1.0)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())


def test_the_maximum_is_over_all_micro_batches_and_each_clip_begins_anew() -> None:
    """A step whose first micro batch alone goes over tau is clipped; the next step is judged by its own."""
    model = one_layer("llama")
    clip = QKClip(model, tau=1.0)
    passes = []
    for seed in (1, 2, 3):
        with torch.no_grad(), clip.monitor.watch():
            model.model(input_ids=tiny_ids(seed=seed), use_cache=False)
        passes.append(clip.monitor.largest()[0].max().item())
        clip.monitor.reset()
    order = sorted(range(3), key=lambda i: -passes[i])
    assert passes[order[0]] > passes[order[2]]
    for number in order:  # the largest first, the last one is smaller
        with torch.no_grad(), clip.monitor.watch():
            model.model(input_ids=tiny_ids(seed=number + 1), use_cache=False)
    assert clip.apply().largest_logit == pytest.approx(max(passes))
    assert clip.apply() == ClipReport(-math.inf, 0, 1.0)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma3", "cohere"])
def test_behind_a_qk_norm_only_the_gains_change_and_the_logit_comes_to_tau(family: str) -> None:
    """Qwen3 and Gemma 3 (which multiplies by 1 + weight) share gains between heads; OLMo 2 and Cohere don't."""
    torch.manual_seed(0)
    configs = {"olmo2": Olmo2Config(**TINY), "cohere": CohereConfig(**TINY, use_qk_norm=True),
               "gemma3": Gemma3TextConfig(**TINY, head_dim=16)}  # fmt: skip
    if family == "qwen3":
        model = tiny_model("qwen3", num_hidden_layers=1)
    else:
        model = AutoModelForCausalLM.from_config(configs[family], attn_implementation="sdpa").eval()
        spread_weights(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight.view(-1)[:16].mul_(5.0)
    before = probed(QKClip(model), model)
    tau = before.max().item() / 2
    untouched = copy.deepcopy(model.state_dict())
    clip = QKClip(model, tau)
    seen(clip, model)
    report = clip.apply()
    after = probed(clip, model)
    torch.testing.assert_close(after.max().item(), tau, rtol=1e-5, atol=0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, untouched[name])}
    assert changed == {f"model.layers.0.self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
    if family in ("qwen3", "gemma3"):
        assert report.clipped_heads == 4
        torch.testing.assert_close(after, before / 2, rtol=1e-5, atol=1e-6)
    else:
        assert report.clipped_heads == 2
        assert torch.equal(after[2:], before[2:])


def test_scaling_the_weights_behind_a_qk_norm_would_do_nothing() -> None:
    model = tiny_model("qwen3", num_hidden_layers=1)
    before = probed(QKClip(model), model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(0.25)
    torch.testing.assert_close(probed(QKClip(model), model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("blend", [1.0, 0.4])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_ternary_layer_keeps_its_codes_and_its_logit_comes_to_tau(family: str, blend: float) -> None:
    model = convert_to_bitnet(one_layer(family))
    for _, layer in quant_linears(model):
        layer.quantisation_blend.fill_(blend)
    projections = {name: layer for name, layer in quant_linears(model) if name.endswith(("q_proj", "k_proj"))}
    codes = {name: ternary_codes(layer) for name, layer in projections.items()}
    before = probed(QKClip(model), model)
    tau = before.max().item() / 3
    clip = QKClip(model, tau, alpha=0.25)
    seen(clip, model)
    assert clip.apply().clipped_heads == 4
    after = probed(clip, model)
    torch.testing.assert_close(after.max().item(), tau, rtol=1e-4, atol=0)
    torch.testing.assert_close(after, before / 3, rtol=1e-4, atol=1e-5)
    for name, layer in projections.items():
        new_codes, new_scale = ternary_codes(layer)
        old_codes, old_scale = codes[name]
        assert torch.equal(new_codes, old_codes)
        share = 0.25 if name.endswith("q_proj") else 0.75
        torch.testing.assert_close(new_scale, old_scale * 3**-share)


def test_scaling_the_rows_of_a_ternary_head_would_change_codes() -> None:
    """Why ternary layers are clipped whole."""
    model = convert_to_bitnet(one_layer("llama"))
    layer = model.model.layers[0].self_attn.q_proj
    codes, _ = ternary_codes(layer)
    with torch.no_grad():
        layer.weight[:16] *= 0.3
    assert not torch.equal(ternary_codes(layer)[0], codes)


def test_where_it_can_do_nothing_it_warns_and_changes_nothing() -> None:
    torch.manual_seed(0)
    fused = AutoModelForCausalLM.from_config(Phi3Config(**TINY), attn_implementation="sdpa").eval()
    frozen = tiny_model("llama", num_hidden_layers=1)
    frozen.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    bare = tiny_model("qwen3", num_hidden_layers=1)
    bare.model.layers[0].self_attn.q_norm = nn.RMSNorm(16, elementwise_affine=False)
    for model, why in (
        (fused, "layers 0: their query and key do not come from linears named q_proj and k_proj"),
        (frozen, "layers 0: the parameters that scale their logits are frozen"),
        (bare, "layers 0: their QK-norm has no gains"),
    ):
        untouched = copy.deepcopy(model.state_dict())
        with pytest.warns(UserWarning, match=why):
            clip = QKClip(model, tau=1e-3)
        largest_H = seen(clip, model)
        assert clip.apply() == ClipReport(largest_H.max().item(), 0, 1.0)
        assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())


def test_a_layer_that_can_be_clipped_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("llama", "qwen2", "qwen3"):
            QKClip(tiny_model(family))
            QKClip(convert_to_bitnet(tiny_model(family)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_it_before_it_scales(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(100.0)
        model.model.layers[1].self_attn.k_proj.weight[3, 2] = value
    untouched = copy.deepcopy(model.state_dict())
    clip = QKClip(model, tau=1.0)
    with torch.no_grad(), clip.monitor.watch():
        model.model(input_ids=tiny_ids(), use_cache=False)
    with pytest.raises(ValueError, match="layer 1 are no longer finite"):
        clip.apply()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), untouched[name].nan_to_num())


@pytest.mark.parametrize(("tau", "alpha"), [(0.0, 0.5), (-1.0, 0.5), (math.nan, 0.5), (100.0, 1.1), (100.0, -0.1)])
def test_settings_out_of_range_are_refused(tau: float, alpha: float) -> None:
    with pytest.raises(ValueError, match="qk_clip: got"):
        QKClip(tiny_model("llama"), tau, alpha)


def test_what_a_quantiser_or_an_adapter_leaves_nothing_to_scale_is_warned_of() -> None:
    class Fixed(BitNet):
        name = "fixed"
        qk_clip = "nothing"

    fixed, corrected = convert_to_bitnet(one_layer("llama")), convert_to_bitnet(one_layer("llama"))
    fixed.model.layers[0].self_attn.k_proj.weight_quantiser = Fixed()
    corrected.model.layers[0].self_attn.k_proj.correction = LowRank(64, 32, 2, 2, torch.empty(0))
    for model, reason in (
        (fixed, "fixed, has no scale that could be clipped"),
        (corrected, "their query or key has an adapter"),
    ):
        with pytest.warns(UserWarning, match=reason):
            clip = QKClip(model, tau=1e-3)
        untouched = copy.deepcopy(model.state_dict())
        seen(clip, model)
        assert clip.apply().clipped_heads == 0
        assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
