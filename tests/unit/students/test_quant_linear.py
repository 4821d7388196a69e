"""What a converted model keeps, what it computes, and how its warm-up is held."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.integrations.bitnet import AutoBitLinear

from student_trainer.students.adapters.low_rank import LowRank
from student_trainer.students.quant_linear import (
    QuantLinear,
    quant_linears,
    quantisation_blend,
    set_quantisation_blend,
    warmup_blend,
)
from student_trainer.students.quantisers.activations import int8_activations
from student_trainer.students.quantisers.bitnet import BITNET, BitNet
from tests.unit.students.tiny import (
    VOCAB,
    convert_to_bitnet,
    spread_weights,
    ternary_codes,
    tiny_config,
    tiny_ids,
    tiny_model,
)

ORIGINALS = ["llama", "qwen2", "qwen3"]
ternary_linear = partial(QuantLinear, weight_quantiser=BITNET, activation_quantiser=int8_activations)


@pytest.mark.parametrize("family", [*ORIGINALS, "bitnet"])
def test_names_parameters_head_and_embeddings_stay(family: str) -> None:
    model = tiny_model(family)
    before = dict(model.named_parameters())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    convert_to_bitnet(model)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {name.split(".", 3)[3] for name in set(after) - set(before)}
    norms = {"self_attn.o_proj.rms_norm.weight", "mlp.down_proj.rms_norm.weight"}
    assert added == (set() if family == "bitnet" else norms)
    assert model.get_input_embeddings() is embeddings and model.get_output_embeddings() is head
    assert head.weight is embeddings.weight
    assert len(list(quant_linears(model))) == 2 * 7


@pytest.mark.parametrize("family", ORIGINALS)
def test_quantisation_and_sub_norm_off_equal_the_original(family: str) -> None:
    original = tiny_model(family)
    model = convert_to_bitnet(copy.deepcopy(original), sub_norm="none")
    ids_BT = tiny_ids()
    assert not torch.allclose(model(ids_BT).logits, original(ids_BT).logits, atol=0.1)
    set_quantisation_blend(model, 0.0)
    assert torch.equal(model(ids_BT).logits, original(ids_BT).logits)


@pytest.mark.parametrize("family", ORIGINALS)
@pytest.mark.parametrize("sub_norm", ["output", "all"])
def test_sub_norm_alone_changes_the_function(family: str, sub_norm: str) -> None:
    original = tiny_model(family)
    model = convert_to_bitnet(copy.deepcopy(original), sub_norm=sub_norm)
    set_quantisation_blend(model, 0.0)
    ids_BT = tiny_ids()
    difference = (model(ids_BT).logits - original(ids_BT).logits).std() / original(ids_BT).logits.std()
    assert difference > 0.05


def test_sub_norm_all_puts_a_norm_before_every_linear() -> None:
    model = convert_to_bitnet(tiny_model("qwen3"), sub_norm="all", eps=1e-6)
    for _, layer in quant_linears(model):
        assert layer.rms_norm.weight.shape == (layer.in_features,)
        assert layer.rms_norm.variance_epsilon == 1e-6


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bit_linear_equals_transformers_online_linear_in_value_and_gradient(normed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    theirs = AutoBitLinear(64, 48, bias=bias, online_quant=True, use_rms_norm=normed, rms_norm_eps=1e-6)
    ours = ternary_linear(64, 48, bias=bias, sub_norm_eps=1e-6 if normed else None)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == ["quantisation_blend"] and not unexpected
    input_ND, gradient_NO = torch.randn(10, 64), torch.randn(10, 48)
    results = []
    with torch.compiler.set_stance("force_eager"):
        for layer in (theirs, ours):
            taken_ND = input_ND.clone().requires_grad_()
            output_NO = layer(taken_ND)
            output_NO.backward(gradient_NO)
            gradients = [p.grad for p in layer.parameters()]
            results.append([output_NO, taken_ND.grad, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sub_norm_and_straight_through_gradients_equal_the_dense_formula_in_float64() -> None:
    """Forward with the quantised operands; backward as if both quantisers were the identity, through the norm."""
    torch.manual_seed(0)
    layer = ternary_linear(64, 48, bias=False, sub_norm_eps=1e-8)
    nn.init.uniform_(layer.rms_norm.weight, 0.5, 1.5)
    input_ND, gradient_NO = torch.randn(10, 64, requires_grad=True), torch.randn(10, 48)
    output_NO = layer(input_ND)
    output_NO.backward(gradient_NO)

    exact_ND = input_ND.detach().double().requires_grad_()
    gain_D = layer.rms_norm.weight.detach().double()
    normed_ND = exact_ND * (exact_ND.pow(2).mean(-1, keepdim=True) + 1e-8).rsqrt() * gain_D
    factor = 127 / normed_ND.detach().abs().amax(-1, keepdim=True)
    rounded_ND = (normed_ND.detach() * factor).round() / factor
    codes_OI, scale = ternary_codes(layer)
    ternary_OI = codes_OI.double() * scale.double()
    torch.testing.assert_close(output_NO.double(), rounded_ND @ ternary_OI.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), gradient_NO.double().T @ rounded_ND, rtol=1e-5, atol=1e-5)
    normed_ND.backward(gradient_NO.double() @ ternary_OI)
    torch.testing.assert_close(input_ND.grad.double(), exact_ND.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ORIGINALS)
def test_latent_weights_of_every_layer_get_a_gradient(family: str) -> None:
    model = convert_to_bitnet(tiny_model(family)).train()
    ids_BT = tiny_ids()
    model(ids_BT, labels=ids_BT).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_blend_is_saved_with_the_model_and_moves_with_it() -> None:
    model = convert_to_bitnet(tiny_model("llama"))
    assert quantisation_blend(model) == 1.0
    set_quantisation_blend(model, 0.25)
    other = convert_to_bitnet(tiny_model("llama", seed=5))
    other.load_state_dict(model.state_dict())
    assert quantisation_blend(other) == 0.25
    assert quantisation_blend(copy.deepcopy(model).double()) == 0.25
    set_quantisation_blend(other, 1.0)
    assert quantisation_blend(model) == 0.25


def test_models_in_one_process_have_blends_of_their_own() -> None:
    one, two = convert_to_bitnet(tiny_model("llama")), convert_to_bitnet(tiny_model("llama"))
    set_quantisation_blend(one, 0.0)
    ids_BT = tiny_ids()
    expected = two(ids_BT).logits
    set_quantisation_blend(one, 0.5)
    assert torch.equal(two(ids_BT).logits, expected)


def test_blend_out_of_range_or_without_ternary_layers_is_refused() -> None:
    model = convert_to_bitnet(tiny_model("llama"))
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected a number in"):
            set_quantisation_blend(model, wrong)
    with pytest.raises(ValueError, match="no quantised linears"):
        set_quantisation_blend(tiny_model("llama"), 0.5)
    next(quant_linears(model))[1].quantisation_blend.fill_(0.5)
    with pytest.raises(ValueError, match="one value"):
        quantisation_blend(model)


def test_warmup_rises_in_a_line_and_stays_at_one() -> None:
    assert [warmup_blend(step, 4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert warmup_blend(0, 0) == 1.0


def test_unquantised_activations_leave_the_input_exact() -> None:
    model = convert_to_bitnet(tiny_model("llama"), sub_norm="none", quantise_activations=False)
    layer = model.model.layers[0].self_attn.q_proj
    input_ND = torch.randn(3, 64)
    codes_OI, scale = ternary_codes(layer)
    torch.testing.assert_close(layer(input_ND), input_ND @ (codes_OI.float() * scale).T)


def test_classification_head_stays_in_full_precision() -> None:
    config = tiny_config("qwen2", num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    spread_weights(model)
    convert_to_bitnet(model)
    assert type(model.score) is nn.Linear
    assert len(list(quant_linears(model))) == 2 * 7
    assert model(tiny_ids()).logits.shape == (2, 3)


def test_bfloat16_model_stays_bfloat16() -> None:
    model = convert_to_bitnet(tiny_model("llama", dtype=torch.bfloat16))
    assert model(tiny_ids()).logits.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.down_proj.rms_norm.weight.dtype == torch.bfloat16


def test_what_cannot_be_converted_says_why() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no nn\.Linear"):
        convert_to_bitnet(gpt2)
    with pytest.raises(ValueError, match="already quantised"):
        convert_to_bitnet(convert_to_bitnet(tiny_model("llama")))
    with pytest.raises(ValueError, match="expected 'output', 'all' or 'none'"):
        convert_to_bitnet(tiny_model("llama"), sub_norm="some")
    for sub_norm in ("all", "none"):
        with pytest.raises(ValueError, match="has SubLN built in"):
            convert_to_bitnet(tiny_model("bitnet"), sub_norm=sub_norm)
    foreign = tiny_model("llama")
    foreign.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(ValueError, match="one down_proj in each of 2 layers, found 1"):
        convert_to_bitnet(foreign)
    with pytest.raises(ValueError, match="eps"):
        convert_to_bitnet(tiny_model("llama"), eps=0.0)


def test_eps_without_effect_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        convert_to_bitnet(tiny_model("llama"), sub_norm="none", eps=1e-6)
        convert_to_bitnet(tiny_model("bitnet"), eps=1e-6)
    assert [record.message.startswith("eps=1e-06 has no effect") for record in caplog.records] == [True, True]


def test_training_with_warmup_wins_back_what_conversion_broke() -> None:
    """SubLN and ternary weights break a trained model at once; training through the warm-up repairs it."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    train(model, steps=120)
    learnt = loss_of(model)
    convert_to_bitnet(model)
    set_quantisation_blend(model, 0.0)
    broken_by_norms = loss_of(model)
    set_quantisation_blend(model, 1.0)
    broken = loss_of(model)
    train(model, steps=120, warmup_steps=40)
    won_back = loss_of(model)
    assert learnt < 0.3 and broken_by_norms > 1.2 * learnt and broken > 2.0, (learnt, broken_by_norms, broken)
    assert quantisation_blend(model) == 1.0
    assert won_back < learnt + 0.25 * (broken - learnt), (learnt, broken, won_back)


def sequences(seed: int) -> torch.Tensor:
    """[16, 24] ids where each is the one before plus a step that the first two show."""
    generator = torch.Generator().manual_seed(seed)
    first_B1 = torch.randint(VOCAB, (16, 1), generator=generator)
    step_B1 = torch.randint(1, 4, (16, 1), generator=generator)
    return (first_B1 + step_B1 * torch.arange(24)) % VOCAB


def train(model: nn.Module, steps: int, warmup_steps: int | None = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        if warmup_steps is not None:
            set_quantisation_blend(model, warmup_blend(step, warmup_steps))
        ids_BT = sequences(step)
        model(ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    ids_BT = sequences(10_000)
    return model(ids_BT, labels=ids_BT).loss.item()


@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_a_correction_is_of_the_normed_input_that_is_not_rounded(blend: float) -> None:
    """y = W(blend) a(x) + b + (alpha / r) B A x in float64, x behind SubLN; the correction has its gradient."""
    torch.manual_seed(0)
    layer = ternary_linear(64, 48, sub_norm_eps=1e-6, correction=LowRank(64, 48, 3, 6, torch.empty(0)))
    nn.init.uniform_(layer.rms_norm.weight, 0.5, 1.5)
    layer.quantisation_blend.fill_(blend)
    input_ND = torch.randn(10, 64)
    plain_NO = layer(input_ND)
    layer.correction.lora_B.weight.data.normal_()
    output_NO, gradient_NO = layer(input_ND), torch.randn(10, 48)
    output_NO.backward(gradient_NO)
    exact_ND = input_ND.double()
    normed_ND = exact_ND * (exact_ND.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.rms_norm.weight.double()
    a_RD, b_OR = (each.weight.detach().double() for each in (layer.correction.lora_A, layer.correction.lora_B))
    added_NO = 2.0 * normed_ND @ a_RD.T @ b_OR.T
    torch.testing.assert_close((output_NO - plain_NO).double(), added_NO.detach(), rtol=1e-4, atol=1e-4)
    expected_OR = 2.0 * gradient_NO.double().T @ (normed_ND @ a_RD.T)
    gradient_OR = layer.correction.lora_B.weight.grad.double()
    torch.testing.assert_close(gradient_OR, expected_OR.detach(), rtol=1e-4, atol=1e-4)
    layer.correction = None
    assert torch.equal(layer(input_ND), plain_NO)


def test_what_a_quantiser_learns_beside_the_weight_is_a_parameter_of_the_layer() -> None:
    class Scaled(BitNet):
        def learnt(self, layer: nn.Linear) -> dict[str, torch.Tensor]:
            if layer.in_features % 2:
                raise ValueError("an odd width")
            return {"weight_step": torch.full((layer.out_features, 1), 2.0)}

        def weight(self, layer: nn.Linear, blend_: torch.Tensor) -> torch.Tensor:
            return super().weight(layer, blend_) * layer.weight_step

    layer = QuantLinear(8, 6, weight_quantiser=Scaled())
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "weight_step"]
    layer(torch.ones(1, 8)).sum().backward()
    assert layer.weight_step.grad.shape == (6, 1) and bool(layer.weight_step.grad.any())
    with pytest.raises(ValueError, match="odd width"):
        QuantLinear(7, 6, weight_quantiser=Scaled())
