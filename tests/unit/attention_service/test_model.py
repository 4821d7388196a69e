"""The cut model against transformers' own modules, step by step, for every architecture that is served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from attention_service.model import MODEL_TYPES, AttentionModel
from teacher_proto import hardware
from teacher_proto.attention import AttentionQuery, AttentionSpec
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.compute.relations import FORMS, relations
from teacher_proto.errors import EngineError
from teacher_proto.model_files import find_model
from tests.models import save_tiny_wrapper
from tests.unit.attention_service.models import LAYERS, VOCAB, save_tiny
from tests.unit.attention_service.reference import PARTS, load_whole, true_maps, true_states

LENGTHS = (19, 7, 1, 33)
LAST = 2


def load(folder: Path, *, layer: int = LAST, dtype: str = "float32") -> AttentionModel:
    return AttentionModel(find_model(str(folder)), dtype=dtype, device="cpu", highest_layer=lambda _: layer)


def sequences(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(0, VOCAB, length) for length in lengths]


def ask(model: AttentionModel, *tokens: np.ndarray, rows: Any = None, **spec: Any) -> list[AttentionTargets]:
    asked = AttentionSpec(**({"kind": "states", "layer": LAST} | spec))
    return model.attend([AttentionQuery(one, asked, None if rows is None else rows[i]) for i, one in enumerate(tokens)])


@pytest.fixture(scope="module", params=MODEL_TYPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[AttentionModel, Any]:
    folder = save_tiny(tmp_path_factory.mktemp("models") / request.param, request.param)
    return load(folder), load_whole(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttentionModel, Any]:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "one", "qwen3")
    return load(folder), load_whole(folder)


@pytest.mark.parametrize("layer", range(LAST + 1))
def test_states_are_what_projections_norms_and_rope_make(pair: tuple[AttentionModel, Any], layer: int) -> None:
    model, whole = pair
    tokens = sequences(*LENGTHS)
    for answer, tokens_T in zip(ask(model, *tokens, layer=layer), tokens, strict=True):
        for part, truth in true_states(whole, tokens_T, layer).items():
            got = getattr(answer, part).astype(np.float32)
            np.testing.assert_allclose(got, truth, rtol=2e-3, atol=2e-3 * np.abs(truth).max())


@pytest.mark.parametrize("layer", range(LAST + 1))
def test_maps_are_those_of_output_attentions(pair: tuple[AttentionModel, Any], layer: int) -> None:
    model, whole = pair
    tokens = sequences(*LENGTHS)
    for answer, tokens_T in zip(ask(model, *tokens, kind="maps", layer=layer), tokens, strict=True):
        assert answer.maps is not None
        np.testing.assert_allclose(answer.maps.astype(np.float32), true_maps(whole, tokens_T, layer), atol=6e-4)


def test_the_layers_above_are_neither_loaded_nor_computed(qwen3: tuple[AttentionModel, Any]) -> None:
    model, whole = qwen3
    body = model._model
    assert len(body.layers) == LAST + 1 == len(whole.base_model.layers) - 1
    assert not hasattr(body, "lm_head")
    ran: list[str] = []
    watched = {
        "mlp of 1": body.layers[1].mlp,
        "mlp of 2": body.layers[2].mlp,
        "o of 2": body.layers[2].self_attn.o_proj,
    }
    hooks = [m.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, m in watched.items()]
    ask(model, *sequences(5), layer=2)
    assert ran == ["mlp of 1"]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["states", "relations", "maps"])
def test_a_batch_of_mixed_lengths_is_answered_as_each_alone(qwen3: tuple[AttentionModel, Any], kind: str) -> None:
    model, _ = qwen3
    tokens = sequences(*LENGTHS)
    spec = {"kind": kind, "form": FORMS["paper"] if kind == "relations" else None, "relation_heads": 4}
    for together, tokens_T in zip(ask(model, *tokens, **spec), tokens, strict=True):
        (alone,) = ask(model, tokens_T, **spec)
        for name, array in together.tensors().items():
            np.testing.assert_allclose(array.astype(np.float32), getattr(alone, name).astype(np.float32), atol=2e-3)


def test_one_pass_serves_several_layers(qwen3: tuple[AttentionModel, Any]) -> None:
    model, _ = qwen3
    (tokens_T,) = sequences(9)
    queries = [AttentionQuery(tokens_T, AttentionSpec("states", layer)) for layer in (2, 0, 1)]
    for query, answer in zip(queries, model.attend(queries), strict=True):
        (alone,) = model.attend([query])
        assert answer.layer == query.spec.layer
        np.testing.assert_allclose(answer.query, alone.query, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_relations_from_states_are_the_served_ones(qwen3: tuple[AttentionModel, Any], form: str, causal: bool) -> None:
    model, whole = qwen3
    (tokens_T,) = sequences(21)
    chosen = replace(FORMS[form], causal=causal)
    (served,) = ask(model, tokens_T, kind="relations", form=chosen, relation_heads=4)
    (states,) = ask(model, tokens_T)
    for part, exact in true_states(whole, tokens_T, LAST).items():
        table = getattr(served, part).astype(np.float32)
        for source, allowed in ((states.states()[part], 6e-4), (exact, 4e-3)):
            rebuilt = relations(torch.tensor(source), form=chosen, relation_heads=4).numpy()
            np.testing.assert_allclose(table, rebuilt, atol=allowed)


@pytest.mark.parametrize("kind", ["relations", "maps"])
def test_rows_are_slices_of_the_whole(qwen3: tuple[AttentionModel, Any], kind: str) -> None:
    model, _ = qwen3
    tokens = sequences(19, 8)
    rows = [np.array([0, 3, 18]), np.array([7])]
    spec = {"kind": kind, "form": FORMS["official"] if kind == "relations" else None, "relation_heads": 4}
    for whole, cut, rows_r in zip(
        ask(model, *tokens, **spec), ask(model, *tokens, rows=rows, **spec), rows, strict=True
    ):
        assert cut.rows is not None and cut.rows.tolist() == rows_r.tolist()
        for name in PARTS if kind == "relations" else ("maps",):
            np.testing.assert_allclose(getattr(cut, name), getattr(whole, name)[:, rows_r], atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 4, 7, 64])
def test_maps_within_blocks_are_the_diagonal_of_whole_maps(qwen3: tuple[AttentionModel, Any], block_size: int) -> None:
    model, _ = qwen3
    (tokens_T,) = sequences(18)
    (whole,), (blocks,) = (ask(model, tokens_T, kind="maps", **more) for more in ({}, {"block_size": block_size}))
    assert whole.maps is not None and blocks.maps is not None
    for t in range(18):
        start = t // block_size * block_size
        inside = whole.maps[:, t, start : start + block_size]
        np.testing.assert_array_equal(blocks.maps[:, t, : inside.shape[1]], inside)
        assert not blocks.maps[:, t, inside.shape[1] :].any()


def test_blocks_of_rows_make_no_difference(qwen3: tuple[AttentionModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = qwen3
    (tokens_T,) = sequences(33)
    spec = {"kind": "relations", "form": FORMS["minilm"], "relation_heads": 8}
    (whole,), (maps,) = ask(model, tokens_T, **spec), ask(model, tokens_T, kind="maps")
    monkeypatch.setattr("attention_service.records.BLOCK_ENTRIES", 8 * 33 * 5)
    (cut,), (cut_maps,) = ask(model, tokens_T, **spec), ask(model, tokens_T, kind="maps")
    np.testing.assert_allclose(whole.key, cut.key, atol=1e-6)
    np.testing.assert_allclose(maps.maps, cut_maps.maps, atol=1e-6)


def test_int8_states_are_within_half_a_step_of_each_row(qwen3: tuple[AttentionModel, Any]) -> None:
    model, whole = qwen3
    (tokens_T,) = sequences(21)
    (answer,) = ask(model, tokens_T, dtype="int8")
    assert answer.query is not None and answer.query.dtype == np.int8
    for part, truth in true_states(whole, tokens_T, LAST).items():
        scale_TH1 = getattr(answer, f"{part}_scale")
        assert (np.abs(answer.states()[part] - truth) <= scale_TH1 * 0.51 + 1e-5).all()


def test_states_that_do_not_fit_float16_are_refused_with_what_to_ask_for(tmp_path: Path) -> None:
    model = load(save_tiny(tmp_path / "big", "llama"))
    with torch.no_grad():
        model._model.layers[LAST].self_attn.v_proj.weight *= 1e6
    (tokens_T,) = sequences(5)
    with pytest.raises(EngineError, match="value of layer 2 does not fit float16: request states with dtype int8"):
        ask(model, tokens_T)
    (answer,) = ask(model, tokens_T, dtype="int8")
    assert np.isfinite(answer.states()["value"]).all()


@pytest.mark.parametrize(("computes", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_of_the_checkpoint_is_taken_where_it_is_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computes: bool, dtype: torch.dtype
) -> None:
    folder = save_tiny(tmp_path / "half", "qwen3", dtype=torch.bfloat16)
    monkeypatch.setattr(hardware, "_computes", lambda dtype, device: dtype == torch.float32 or computes)
    assert load(folder, dtype="auto").dtype == dtype
    assert load(folder, dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="dtype 'int4' is not one of"):
        load(folder, dtype="int4")


@pytest.mark.parametrize("computes", [True, False])
def test_a_dtype_that_is_emulated_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, computes: bool
) -> None:
    folder = save_tiny(tmp_path / "half", "qwen3", dtype=torch.bfloat16)
    monkeypatch.setattr(hardware, "_computes", lambda dtype, device: dtype == torch.float32 or computes)
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert ("bfloat16 is emulated" in caplog.text) is not computes


@pytest.mark.parametrize(
    ("family", "plain"), [("gemma3", "gemma3_text"), ("mistral3", "mistral"), ("qwen3_vl", "qwen3")]
)
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_of_a_wrapper_the_language_model_is_served(tmp_path: Path, family: str, plain: str, prefix: str) -> None:
    """As the plain model of the same weights is, under both names that weights of wrappers have had."""
    wrapper = save_tiny_wrapper(tmp_path / "wrapper", family)
    saved = load_file(wrapper / "model.safetensors")
    own = {name.removeprefix("language_model.").removeprefix("model."): tensor
           for name, tensor in ((name.removeprefix("model."), tensor) for name, tensor in saved.items())
           if name.startswith("language_model.")}  # fmt: skip
    assert "layers.0.input_layernorm.weight" in own
    towers = {name: tensor for name, tensor in saved.items() if "vis" in name}
    save_file({prefix + name: tensor for name, tensor in own.items()} | towers, wrapper / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    text = AutoConfig.from_pretrained(wrapper).get_text_config().to_dict()
    if plain == "qwen3":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    del text["model_type"]
    alone = AutoModelForCausalLM.from_config(AutoConfig.for_model(plain, **text))
    alone.load_state_dict({f"model.{name}": tensor for name, tensor in own.items()}, strict=False)
    alone.save_pretrained(tmp_path / "plain")
    tokens = sequences(*LENGTHS)
    ours, theirs = (ask(load(folder, layer=1), *tokens, layer=1) for folder in (wrapper, tmp_path / "plain"))
    for a, b in zip(ours, theirs, strict=True):
        for part in PARTS:
            np.testing.assert_allclose(getattr(a, part), getattr(b, part), atol=1e-3, rtol=2**-10)


def test_an_architecture_that_is_not_served_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "other", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    with pytest.raises(ValueError, match="other is a 'gpt2' model; attention is served for gemma, gemma2"):
        load(folder)


def test_files_that_lack_a_weight_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "holed", "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holed: its files lack layers\.1\.self_attn\.k_proj\.weight"):
        load(folder)


def test_every_layer_may_be_the_highest(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "all", "qwen3")
    for layer in range(LAYERS):
        model = load(folder, layer=layer)
        assert (model.shape.max_layer, model.shape.num_layers) == (layer, LAYERS)
        assert model.shape.widths == {"query": 64, "key": 32, "value": 32}
