"""muon_clip: torch's Muon where it belongs, AdamW elsewhere, one state, and stability by QK-clip."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from student_trainer.optim.optimizer import Optimizer, build_optimizer
from student_trainer.optim.qk_clip import ClipReport
from student_trainer.settings import OptimSettings
from tests.unit.optim.dense import newton_schulz
from tests.unit.students.tiny import convert_to_bitnet, tiny_ids, tiny_model


def settings(**changes: Any) -> OptimSettings:
    return OptimSettings.model_validate({"kind": "muon_clip", "learning_rate": 0.01, "clip_norm": None} | changes)


def built(model: Any, steps: int = 10, **changes: Any) -> Optimizer:
    return build_optimizer(settings(**changes), model, model.lm_head, steps)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def muon_names(optimizer: Optimizer) -> set[str]:
    return {key.removesuffix("//momentum_buffer") for key in optimizer.state() if key.endswith("//momentum_buffer")}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_hidden_matrices_and_adamw_everything_else(tied: bool) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    optimizer = built(model)
    give_gradients(model, 0)
    optimizer.step(0)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    expected = {f"model.layers.{i}.{part}.{p}.weight" for i in (0, 1) for p in projections
                for part in (["mlp"] if p.startswith(("gate", "up", "down")) else ["self_attn"])}  # fmt: skip
    assert muon_names(optimizer) == expected
    adamw = {key.removesuffix("//exp_avg") for key in optimizer.state() if key.endswith("//exp_avg")}
    assert adamw == {name for name, _ in model.named_parameters()} - expected
    assert "model.embed_tokens.weight" in adamw and ("lm_head.weight" in adamw) is not tied


def test_a_ternary_student_has_its_latent_weights_in_muon_and_its_norms_in_adamw() -> None:
    model = convert_to_bitnet(tiny_model("llama"))
    optimizer = built(model)
    give_gradients(model, 0)
    optimizer.step(0)
    assert "model.layers.1.mlp.down_proj.weight" in muon_names(optimizer)
    assert "model.layers.1.mlp.down_proj.rms_norm.weight//exp_avg" in optimizer.state()


def test_steps_are_those_of_torchs_own_optimizers_bit_for_bit() -> None:
    ours = tiny_model("qwen2", tie_word_embeddings=False)
    theirs = copy.deepcopy(ours)
    optimizer = built(
        ours, weight_decay=0.2, schedule={"kind": "constant"}, vectors={"learning_rate": 0.002},
        embeddings={"learning_rate": 0.003, "weight_decay": 0.05},
        muon={"momentum": 0.9, "nesterov": True, "newton_schulz_steps": 4},
    )  # fmt: skip
    hidden, tables, vectors = [], [], []
    for name, parameter in theirs.named_parameters():
        (vectors if parameter.ndim == 1 else tables if "embed" in name or "lm_head" in name else hidden).append(
            parameter
        )
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.2, momentum=0.9, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": tables, "lr": 0.003, "weight_decay": 0.05}, {"params": vectors, "lr": 0.002, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    for step in range(4):
        for model in (ours, theirs):
            give_gradients(model, step)
        optimizer.step(step)
        muon.step()
        adamw.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (24, 80)])
def test_an_update_is_the_orthogonal_matrix_of_an_independent_reference(shape: tuple[int, int]) -> None:
    """Two steps of Nesterov momentum in float64; torch iterates in bfloat16, hence the tolerance."""
    torch.manual_seed(shape[0])
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    optimizer = build_optimizer(settings(schedule={"kind": "constant"}, weight_decay=0.1), model, None, 10)
    weight = model[0].weight
    expected = weight.detach().double().numpy().copy()
    momentum = np.zeros(shape)
    for step in range(2):
        give_gradients(model, step)
        gradient = weight.grad.double().numpy()
        momentum = 0.95 * momentum + gradient  # the report's sum; torch keeps a mean, which has the same direction
        orthogonal = newton_schulz(0.95 * momentum + gradient)
        before = weight.detach().double().numpy().copy()
        optimizer.step(step)
        update = (before * (1 - 0.01 * 0.1) - weight.detach().double().numpy()) / 0.01
        reference = 0.2 * np.sqrt(max(shape)) * orthogonal
        assert np.linalg.norm(update - reference) < 0.02 * np.linalg.norm(reference)
        # About as large as AdamW's updates, and every direction about as long as any other.
        assert 0.15 < np.sqrt((update**2).mean()) < 0.25
        singular = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(max(shape)))
        assert singular.min() > 0.6 and singular.max() < 1.3
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * reference
    assert np.abs(weight.detach().double().numpy() - expected).max() < 1e-3


def train(model: Any, optimizer: Optimizer, first: int, last: int) -> list[ClipReport]:
    """Updates first..last of a fixed run of two micro batches each, with a tau that bites."""
    reports = []
    for number in range(first, last):
        for half in (0, 1):
            ids_BT = tiny_ids(seed=100 + 2 * number + half)
            with optimizer.watching(torch.ones_like(ids_BT, dtype=torch.bool)):
                hidden = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
            nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step(number)
        optimizer.zero_grad()
        assert optimizer.clipped is not None
        reports.append(optimizer.clipped)
    return reports


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "ternary"])
def test_a_run_stopped_and_resumed_is_the_run_that_never_stopped(family: str) -> None:
    """Through safetensors bytes, as a checkpoint keeps it: nothing but tensors, by name."""

    def fresh() -> tuple[Any, Optimizer]:
        model = tiny_model("llama") if family == "ternary" else tiny_model(family)
        model = convert_to_bitnet(model) if family == "ternary" else model
        return model.train(), built(model, steps=6, qk_clip={"tau": 2.0})

    straight, optimizer = fresh()
    reports = train(straight, optimizer, 0, 6)
    assert any(report.clipped_heads for report in reports[3:])

    stopped, optimizer = fresh()
    train(stopped, optimizer, 0, 3)
    saved = save({name: tensor.contiguous() for name, tensor in optimizer.state().items()})
    weights = copy.deepcopy(stopped.state_dict())

    resumed, optimizer = fresh()
    resumed.load_state_dict(weights)
    optimizer.load(load(saved))
    assert train(resumed, optimizer, 3, 6) == reports[3:]
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_state_survives_as_json_and_tensors_and_another_students_is_refused() -> None:
    model = tiny_model("llama")
    optimizer = built(model)
    assert optimizer.state() == {}
    give_gradients(model, 0)
    optimizer.step(0)
    state = optimizer.state()
    assert all(isinstance(value, Tensor) for value in state.values())
    json.dumps(sorted(state))
    with pytest.raises(ValueError, match="which the student does not have"):
        built(tiny_model("llama", num_hidden_layers=1)).load(state)


def test_a_student_without_hidden_matrices_and_one_with_stacked_ones(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="no trainable hidden matrices"):
        build_optimizer(settings(), nn.Embedding(4, 4), None, 10)
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))
    optimizer = build_optimizer(settings(), model, None, 10)
    assert "1.weight" in caplog.text
    give_gradients(model, 0)
    assert optimizer.step(0)["matrices"] == optimizer.rates(0)["matrices"]
    assert muon_names(optimizer) == {"0.weight"}
    assert "1.weight//exp_avg" in optimizer.state()


def copying_loss(clipped: bool, seed: int) -> tuple[float, float]:
    """A two-layer model learns to repeat 16 random tokens, at a rate far too high: mean loss of the last 10 of 90
    updates, and the largest logit seen. Chance is log 32 = 3.47.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    slow = {"learning_rate": 0.01}
    optimizer = built(
        model, learning_rate=0.3, weight_decay=0.0, embeddings=slow, vectors=slow, schedule={"kind": "constant"},
        qk_clip={"tau": 30.0 if clipped else 1e9},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    losses, largest = [], 0.0
    for number in range(90):
        half_BT = torch.randint(32, (16, 16), generator=generator)
        ids_BT = torch.cat([half_BT, half_BT], 1)
        with optimizer.watching(torch.ones_like(ids_BT, dtype=torch.bool)):
            logits = model(input_ids=ids_BT, use_cache=False).logits[:, 15:-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), half_BT.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(number)
        optimizer.zero_grad()
        assert optimizer.clipped is not None
        largest = max(largest, optimizer.clipped.largest_logit)
        losses.append(loss.item())
    return sum(losses[-10:]) / 10, largest


def test_a_run_that_blows_up_without_qk_clip_learns_with_it() -> None:
    loss, largest = copying_loss(clipped=False, seed=0)
    assert largest > 3000 and loss > 3.3
    loss, largest = copying_loss(clipped=True, seed=0)
    assert largest < 100 and loss < 2.0
