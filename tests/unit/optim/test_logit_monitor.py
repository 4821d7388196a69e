"""The largest attention logits, against float64 and loops."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from student_trainer.batch.view import CausalDocuments
from student_trainer.optim import logit_tiles
from student_trainer.optim.logit_tiles import Visibility, largest_logits
from student_trainer.optim.qk_clip import LogitMonitor
from student_trainer.students.attention_mask import block_mask, dense_mask
from student_trainer.students.capture import AttentionStates
from tests.unit.optim import dense
from tests.unit.students.tiny import convert_to_bitnet, tiny_ids, tiny_model

ROWS, LENGTH = 3, 24
# Two documents and padding; the third row is full.
DOCUMENTS_BT = torch.tensor([[0] * 9 + [1] * 11 + [-1] * 4, [0] * 2 + [1] * 20 + [-1] * 2, [0] * 24])
POSITIONS_BT = torch.tensor([[*range(9), *range(11), 0, 0, 0, 0], [*range(2), *range(20), 0, 0], [*range(24)]])


def decode(model: Any, rows: slice = slice(0, ROWS), attention: str = "sdpa") -> Tensor:
    seen = dense_mask(CausalDocuments(DOCUMENTS_BT[rows]))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if attention == "eager" else seen
    out = model.model(
        input_ids=tiny_ids(ROWS, LENGTH)[rows], attention_mask=mask, position_ids=POSITIONS_BT[rows], use_cache=False
    )
    return out.last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "ternary"])
@torch.no_grad()
def test_largest_logits_are_those_of_dense_attention(family: str, attention: str) -> None:
    model = tiny_model("qwen2" if family == "ternary" else family, attention=attention)
    if family == "ternary":
        convert_to_bitnet(model)
    monitor = LogitMonitor(model)
    with monitor.watch(DOCUMENTS_BT >= 0):
        decode(model, attention=attention)
    for layer, largest_H in monitor.largest().items():
        expected = dense.largest_logits(
            model, layer, lambda: decode(model, attention=attention), DOCUMENTS_BT, POSITIONS_BT
        )
        torch.testing.assert_close(largest_H.tolist(), expected, rtol=2e-5, atol=1e-5)


@torch.no_grad()
def test_micro_batches_add_up_to_the_batch_and_a_reset_forgets_them() -> None:
    model = tiny_model("llama")
    monitor = LogitMonitor(model)
    with monitor.watch(DOCUMENTS_BT >= 0):
        decode(model)
    whole = monitor.largest()
    monitor.reset()
    assert monitor.largest() == {}
    of_last = None
    for row in range(ROWS):
        with monitor.watch(DOCUMENTS_BT[row : row + 1] >= 0):
            decode(model, slice(row, row + 1))
        if row == ROWS - 1:
            alone = LogitMonitor(model)
            with alone.watch():
                decode(model, slice(row, row + 1))
            of_last = alone.largest()
    assert of_last is not None
    for layer, largest_H in monitor.largest().items():
        torch.testing.assert_close(largest_H, whole[layer])
        assert (largest_H >= of_last[layer]).all()
    assert any((whole[layer] > of_last[layer]).any() for layer in whole)


@torch.no_grad()
def test_padding_counts_only_where_it_is_not_said_to_be_padding() -> None:
    model = tiny_model("llama")
    ids_BT = tiny_ids(1, 48)
    documents_BT = torch.tensor([[0] * 5 + [-1] * 43])
    found = []
    for valid in (None, documents_BT >= 0):
        monitor = LogitMonitor(model)
        with monitor.watch(valid):
            model.model(input_ids=ids_BT, attention_mask=dense_mask(CausalDocuments(documents_BT)), use_cache=False)
        found.append(monitor.largest()[0])
    alone = LogitMonitor(model)
    with alone.watch():
        model.model(input_ids=ids_BT[:, :5], use_cache=False)
    torch.testing.assert_close(found[1], alone.largest()[0])
    assert (found[0] > found[1] + 0.1).all()


def test_watching_changes_no_bit_of_output_or_gradient_and_leaves_no_trace() -> None:
    model = tiny_model("qwen3").train()
    twin = copy.deepcopy(model)
    configs = [layer.self_attn.config for layer in model.model.layers]
    monitor = LogitMonitor(model)
    with monitor.watch(DOCUMENTS_BT >= 0):
        watched = decode(model)
    plain = decode(twin)
    assert torch.equal(watched, plain)
    watched.square().sum().backward()
    plain.square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    with pytest.raises(RuntimeError, match="boom"), monitor.watch():
        raise RuntimeError("boom")
    assert [layer.self_attn.config for layer in model.model.layers] == configs


def test_gradient_checkpointing_and_attention_states_do_not_disturb_it() -> None:
    model = tiny_model("llama").train()
    monitor = LogitMonitor(model)
    with monitor.watch(DOCUMENTS_BT >= 0):
        decode(model)
    plain = monitor.largest()
    monitor.reset()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with monitor.watch(DOCUMENTS_BT >= 0), AttentionStates(model, 1) as states:
        hidden = decode(model)
    query = states.take().query
    (hidden.square().sum() + query.square().sum()).backward()
    assert all(torch.equal(plain[layer], largest_H) for layer, largest_H in monitor.largest().items())
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def states(heads: int = 4, key_heads: int = 2, length: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, heads, length, 8, generator=generator),
        torch.randn(2, key_heads, length, 8, generator=generator),
    )


def looped(query: Tensor, key: Tensor, seen: Tensor) -> list[float]:
    group = query.shape[1] // key.shape[1]
    logits = torch.stack([query[:, h].double() @ key[:, h // group].double().mT for h in range(query.shape[1])], 1)
    return logits.masked_fill(~seen, -torch.inf).amax((0, 2, 3)).tolist()


@pytest.mark.parametrize("tile_bytes", [1, 2**12, 2**30])
@pytest.mark.parametrize("form", ["none", "full", "booleans", "additive", "by head", "blocks", "window"])
def test_every_form_of_mask_and_size_of_tile_gives_the_same(
    form: str, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logit_tiles.TILE_BYTES, "cpu", tile_bytes)
    monkeypatch.setattr(logit_tiles, "LEAST_ROWS", 7)
    query, key = states()
    length = query.shape[2]
    documents_BT = torch.tensor([[0] * 13 + [1] * 30 + [2] * 7, [0] * 40 + [1] * 9 + [-1]])
    seen = dense_mask(CausalDocuments(documents_BT))
    mask: Any = seen
    causal = True
    if form == "none":
        mask, seen = None, torch.ones(length, length).tril().bool()[None, None]
    elif form == "full":
        mask, seen, causal = None, torch.ones(1, 1, length, length).bool(), False
    elif form == "additive":
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    elif form == "by head":
        mask = seen = seen & (torch.rand(2, 4, length, length, generator=torch.Generator().manual_seed(3)) < 0.5)
    elif form == "blocks":
        mask = block_mask(CausalDocuments(documents_BT))
    elif form == "window":
        seen = dense_mask(CausalDocuments(documents_BT), 5)
        mask = block_mask(CausalDocuments(documents_BT), 5)
    found = largest_logits(query, key, Visibility(mask, causal, None, length, query.device), 0.5)
    torch.testing.assert_close(found.tolist(), [0.5 * x for x in looped(query, key, seen)], rtol=1e-5, atol=1e-6)


def test_rows_that_see_nothing_give_minus_infinity() -> None:
    query, key = states(length=6)
    none = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    assert largest_logits(query, key, Visibility(none, True, None, 6, query.device), 1.0).tolist() == [-torch.inf] * 4
    nobody = torch.zeros(2, 6, dtype=torch.bool)
    assert largest_logits(query, key, Visibility(None, True, nobody, 6, query.device), 1.0).tolist() == [-torch.inf] * 4


def test_a_block_mask_that_is_smaller_than_the_batch_is_read_for_all_of_it() -> None:
    query, key = states(length=40)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 40, 40, device="cpu")
    seen = torch.ones(40, 40).tril().bool()[None, None]
    found = largest_logits(query, key, Visibility(mask, True, None, 40, query.device), 1.0)
    torch.testing.assert_close(found.tolist(), looped(query, key, seen), rtol=1e-5, atol=1e-6)


def test_what_it_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        Visibility(torch.ones(3, 4), True, None, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="got str"):
        Visibility("causal", True, None, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="Linear has no attention"):
        LogitMonitor(torch.nn.Linear(2, 2))
    model = tiny_model("llama")
    cache = model(tiny_ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"), LogitMonitor(model).watch():
        model(tiny_ids(2, 1), past_key_values=cache)
