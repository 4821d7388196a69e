"""The scripted teacher tells the truth that tests hold others against: it is checked here by plain float64."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from safetensors.numpy import load

from serving.engine import Job
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import check_targets
from teacher_service.engines.scripted import Script, ScriptedEngine
from teacher_service.engines.scripted_model import encode_hidden, scripted_head, scripted_hidden, scripted_logits

VOCAB = 512
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 90)


def log_softmax(logits_RV: np.ndarray) -> np.ndarray:
    wide = logits_RV.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


async def score(spec: TargetSpec, rows: tuple[int, int] = (0, 90), gather: np.ndarray | None = None):  # type: ignore[no-untyped-def]
    return await ScriptedEngine().score(Job(Query(TOKENS, rows, spec, gather), "r"))


def test_rows_depend_on_what_came_before_and_on_nothing_after() -> None:
    whole = scripted_logits(TOKENS, VOCAB)
    for length in (1, 2, 45, 89):
        assert np.array_equal(scripted_logits(TOKENS[:length], VOCAB), whole[:length])
    changed = TOKENS.copy()
    changed[40] = (changed[40] + 1) % VOCAB
    other = scripted_logits(changed, VOCAB)
    assert np.array_equal(other[:40], whole[:40])
    assert all((other[t] != whole[t]).any() for t in range(40, 90))


def test_logits_are_the_head_times_the_hidden_states_exactly() -> None:
    product = scripted_hidden(TOKENS) @ scripted_head(VOCAB).T
    assert np.array_equal(product.astype(np.float32), scripted_logits(TOKENS, VOCAB))
    shuffled = (scripted_hidden(TOKENS)[::-1] @ scripted_head(VOCAB)[::-1].T)[::-1, ::-1]
    assert np.array_equal(product, shuffled)


def test_distributions_are_neither_flat_nor_certain() -> None:
    logprobs = log_softmax(scripted_logits(TOKENS, VOCAB))
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=1).mean()
    assert 1.0 < entropy < 5.0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
async def test_top_k_rebuilds_the_exact_probabilities(temperature: float) -> None:
    logits = scripted_logits(TOKENS, VOCAB).astype(np.float64)
    targets = await score(TargetSpec(("top_k",), 40, (temperature,)))
    assert targets.ids is not None and targets.lse is not None and targets.log_z is not None
    ids = targets.ids.astype(np.int64)
    assert np.array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :40])
    truth = np.take_along_axis(np.exp(log_softmax(logits / temperature)), ids, axis=1)
    assert np.abs(targets.probabilities(0, temperature) / truth - 1).max() < 5e-3
    lse = np.log(np.exp(logits).sum(axis=1))
    assert np.abs(targets.lse - lse).max() < 1e-5
    log_z = np.log(np.exp(logits / temperature).sum(axis=1)) - lse / temperature
    assert np.abs(targets.log_z[:, 0] - log_z).max() < 1e-5


async def test_gathered_and_next_logprobs_are_those_of_the_ids_asked() -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, (90, 5))
    targets = await score(TargetSpec(("score", "gather")), gather=ids)
    truth = log_softmax(scripted_logits(TOKENS, VOCAB))
    assert targets.gather_logprobs is not None and targets.next_logprob is not None
    assert np.abs(targets.gather_logprobs / np.take_along_axis(truth, ids, axis=1) - 1).max() < 1e-3
    assert np.abs(targets.next_logprob[:-1] - truth[np.arange(89), TOKENS[1:]]).max() < 1e-5
    assert np.isnan(targets.next_logprob[-1])


async def test_samples_are_drawn_by_the_softened_probabilities() -> None:
    spec = TargetSpec(("sampled",), num_samples=4096, sample_temperature=2.0, seed=3)
    targets = await score(spec)
    truth = np.exp(log_softmax(scripted_logits(TOKENS, VOCAB).astype(np.float64) / 2.0))
    assert targets.sampled_offsets is not None and targets.sampled_ids is not None
    assert targets.sampled_counts is not None
    drawn = np.zeros((90, VOCAB))
    for row, (a, b) in enumerate(zip(targets.sampled_offsets, targets.sampled_offsets[1:], strict=False)):
        drawn[row, targets.sampled_ids[a:b]] = targets.sampled_counts[a:b]
    assert (drawn.sum(axis=1) == 4096).all()
    # Each count is binomial: over 46,000 of them the squared deviations in units of variance average to 1.
    expected = 4096 * truth
    large = expected > 5
    z = ((drawn - expected) ** 2 / (expected * (1 - truth)))[large]
    assert abs(z.mean() - 1) < 0.1
    again, other = await score(spec), await score(TargetSpec(("sampled",), num_samples=4096, seed=4))
    assert np.array_equal(again.sampled_ids, targets.sampled_ids)
    assert other.sampled_ids is None or not np.array_equal(other.sampled_ids, targets.sampled_ids)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_hidden_states_survive_every_dtype(dtype: str) -> None:
    hidden = scripted_hidden(TOKENS)
    encoded = encode_hidden(hidden, dtype)  # type: ignore[arg-type]
    if dtype == "float16":
        decoded = encoded["hidden"].astype(np.float64)
    elif dtype == "bfloat16":
        decoded = (encoded["hidden"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        decoded = encoded["hidden"] * encoded["hidden_scale"][:, None].astype(np.float64)
    bound = 0 if dtype != "int8" else 4 / 127 / 2 + 1e-6
    assert np.abs(decoded - hidden).max() <= bound


async def test_rows_are_a_slice_of_the_whole_in_every_kind() -> None:
    spec = TargetSpec(("top_k", "score", "sampled", "hidden"), 16, (2.0,), 20, 1.5, 9, "int8")
    whole, part = await score(spec), await score(spec, (30, 71))
    for name, array in whole.narrow(30, 71).tensors().items():
        assert np.array_equal(array, getattr(part, name), equal_nan=array.dtype.kind == "f"), name
    check_targets(part, Query(TOKENS, (30, 71), spec), VOCAB)


def test_the_head_file_gives_the_logits_back() -> None:
    file = ScriptedEngine().head()
    tensors = load(file.read(0, file.size))
    logits = scripted_hidden(TOKENS) @ tensors["weight"].astype(np.float64).T * tensors["scale"]
    assert np.array_equal(logits.astype(np.float32), scripted_logits(TOKENS, VOCAB))


async def test_every_field_of_the_identity_can_be_another() -> None:
    plain = ScriptedEngine().identity
    for group in ("semantic", "numeric"):
        for field in type(getattr(plain, group)).model_fields:
            value = {"weights": '{"a": "b"}', "vocab_size": "7", "options": '{"a": "b"}'}.get(field, "other")
            changed = ScriptedEngine(Script(identity={f"{group}.{field}": value})).identity
            assert changed.fingerprint != plain.fingerprint
            assert [line.split(":")[0].rsplit(".", 1)[0] for line in plain.difference(changed)]
    with pytest.raises(ValueError, match="unknown field"):
        ScriptedEngine(Script(identity={"semantic.dtyp": "x"}))


async def test_the_device_serves_at_the_rate_that_the_script_gives() -> None:
    engine = ScriptedEngine(Script(tokens_per_second=1000))
    job = Job(Query(TOKENS, (0, 1), TargetSpec(("score",))), "r")
    started = asyncio.get_running_loop().time()
    await asyncio.gather(*(engine.score(job) for _ in range(5)))
    assert asyncio.get_running_loop().time() - started >= 5 * 0.09
