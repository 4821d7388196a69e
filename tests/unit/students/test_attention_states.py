"""The states taken are those that attention uses, they carry gradients, and taking them changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from student_trainer.students.capture import AttentionStates
from tests.unit.students.tiny import FAMILIES, VOCAB, convert_to_bitnet, tiny_ids, tiny_model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_query_and_key_reproduce_the_models_own_attention_maps(family: str) -> None:
    """softmax(QK^T / sqrt(dh)) of the states is the map that eager attention returns: they are post-RoPE, post-norm."""
    model = tiny_model(family, attention="eager")
    with torch.no_grad(), AttentionStates(model, 1) as states:
        maps_BHTT = model(tiny_ids(), use_cache=False, output_attentions=True).attentions[1]
    query, key, _ = states.take()
    assert query.shape == (2, 16, 4, 16) and key.shape == (2, 16, 2, 16)
    key = key.repeat_interleave(2, dim=2)
    scores_BHTT = torch.einsum("bthd,bshd->bhts", query.double(), key.double()) / 4
    scores_BHTT = scores_BHTT.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(scores_BHTT.softmax(-1).float(), maps_BHTT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_value_is_the_raw_output_of_its_projection(family: str, attention: str) -> None:
    model = convert_to_bitnet(tiny_model(family, attention=attention))
    noted: list[torch.Tensor] = []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _m, _i, output: noted.append(output))
    with torch.no_grad(), AttentionStates(model, 0) as states:
        model(tiny_ids(), use_cache=False)
    assert torch.equal(states.take().value, noted[0].view(2, 16, 2, 16))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_taking_states_changes_no_bit_of_the_output_and_leaves_no_trace(attention: str) -> None:
    model = tiny_model("qwen3", attention=attention)
    configs = [layer.self_attn.config for layer in model.model.layers]
    before = model(tiny_ids()).logits
    with AttentionStates(model, 1) as states:
        assert model.model.layers[0].self_attn.config is configs[0]
        inside = model(tiny_ids(), use_cache=False).logits
    states.take()
    assert torch.equal(before, inside) and torch.equal(before, model(tiny_ids()).logits)
    assert [layer.self_attn.config for layer in model.model.layers] == configs
    assert model.config._attn_implementation == attention
    with pytest.raises(RuntimeError, match="boom"), AttentionStates(model, 1):
        raise RuntimeError("boom")
    assert model.model.layers[1].self_attn.config is configs[1]


def test_states_are_the_same_through_sdpa_and_eager() -> None:
    taken = []
    for attention in ("sdpa", "eager"):
        model = tiny_model("llama", attention=attention)
        with torch.no_grad(), AttentionStates(model, 1) as states:
            model(tiny_ids(), use_cache=False)
        taken.append(states.take())
    for a, b in zip(*taken, strict=True):
        torch.testing.assert_close(a, b)


def gradients(model: Any, checkpointing: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    ids_BT = tiny_ids()
    with AttentionStates(model, 1) as states:
        loss = model(ids_BT, labels=ids_BT, use_cache=False).loss
    query, key, value = states.take()
    (loss + query.pow(2).sum() + key.pow(3).sum() + value.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_flow_and_survive_checkpointing() -> None:
    model = convert_to_bitnet(tiny_model("qwen2"))
    plain, checkpointed = gradients(model, None), gradients(model, {"use_reentrant": False})
    assert plain["model.layers.0.mlp.up_proj.weight"].abs().sum() > 0
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name])


def test_states_without_a_gradient_are_refused_in_training() -> None:
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradients(tiny_model("llama"), {"use_reentrant": True})
    frozen = tiny_model("llama").requires_grad_(False).train()
    with pytest.raises(ValueError, match="must be trainable"):
        gradients(frozen, None)


def test_packed_documents_have_the_states_of_the_documents_alone() -> None:
    model = tiny_model("llama")
    one, two = tiny_ids(1, 6, seed=3), tiny_ids(1, 10, seed=4)
    alone = []
    for ids_BT in (one, two):
        with torch.no_grad(), AttentionStates(model, 1) as states:
            model(ids_BT, use_cache=False)
        alone.append(states.take())
    owner_T = torch.tensor([0] * 6 + [1] * 10)
    mask = (owner_T[:, None] == owner_T) & torch.ones(16, 16).tril().bool()
    with torch.no_grad(), AttentionStates(model, 1) as states:
        model(
            torch.cat([one, two], dim=1), attention_mask=mask[None, None], use_cache=False,
            position_ids=torch.cat([torch.arange(6), torch.arange(10)])[None],
        )  # fmt: skip
    for packed, first, second in zip(states.take(), *alone, strict=True):
        torch.testing.assert_close(packed, torch.cat([first, second], dim=1))


def test_misuse_says_what_to_do() -> None:
    model = tiny_model("llama")
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"attention layer {layer}: LlamaForCausalLM has layers 0 to 1"):
            AttentionStates(model, layer)
    states = AttentionStates(model, 0)
    with pytest.raises(ValueError, match="run the model's forward pass in the block"), states:
        states.take()
    with torch.no_grad(), states:
        model(tiny_ids(), use_cache=False)
        states.take()
        with pytest.raises(ValueError, match="run the model's forward pass"):
            states.take()
    cache = model(tiny_ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"), AttentionStates(model, 0):
        model(torch.randint(VOCAB, (2, 1)), past_key_values=cache)
