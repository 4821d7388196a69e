"""Logits -> packed rows -> record, against dense float64.

`test_reduction_triton.py` runs this file again with the kernels that a CUDA device takes, in Triton's interpreter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_proto import hardware
from teacher_proto.compute import reduction
from teacher_proto.compute.reduction import NO_TOKEN, Rows, reduce_rows
from teacher_proto.compute.sampling import sample_key, uniform_noise
from teacher_proto.compute.top_k import top_k
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets, check_targets
from teacher_proto.wire.packed import RowLayout, count_draws, unpack_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TEMPERATURES = (1.0, 0.5, 2.0, 5.0)
ALL = TargetSpec(kinds=("top_k", "score", "gather", "sampled", "hidden"), top_k=16, temperatures=TEMPERATURES,
                 num_samples=24, seed=1, hidden_dtype="float16")  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, where its interpreter is asked for, and torch's elsewhere."""
    monkeypatch.setattr(hardware, "runs_triton", lambda device: INTERPRETED)


def record(
    logits_NV: torch.Tensor, spec: TargetSpec = ALL, gather_width: int = 6, **rows: Any
) -> tuple[TokenTargets, Rows]:
    """The record of rows whose logits are given: hidden states are row numbers that look them up."""
    n, vocab_size = logits_NV.shape
    generator = torch.Generator().manual_seed(0)
    defaults = Rows(
        next_ids_N=torch.cat([torch.randint(vocab_size, (n - 1,), generator=generator), torch.tensor([NO_TOKEN])]),
        gather_ids_NG=torch.randint(vocab_size, (n, gather_width), generator=generator),
        sample_keys_N=torch.full((n,), sample_key(spec.seed, np.arange(n))),
        positions_N=torch.arange(n),
    )
    asked = replace(defaults, **rows)
    width = gather_width if "gather" in spec.kinds else 0
    layout = RowLayout(spec, vocab_size, width, 1 if "hidden" in spec.kinds else 0)
    packed = reduce_rows(torch.arange(n)[:, None].float(), lambda h: logits_NV[h[:, 0].long()], asked, layout)
    assert packed is not None and packed.dtype == torch.uint8 and packed.shape == (n, layout.row_bytes)
    return unpack_rows(packed.numpy(), 0, layout), asked


def draw_logits(n: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn((n, vocab_size), generator=torch.Generator().manual_seed(seed)) * scale + 7


@pytest.mark.parametrize("vocab_size", [17, 512, 1000, 65_536, 65_537, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_column_is_what_dense_float64_says(vocab_size: int, dtype: torch.dtype) -> None:
    logits = draw_logits(n := 2 if INTERPRETED else 5, vocab_size).to(dtype)
    targets, asked = record(logits)
    truth = torch.log_softmax(logits.double(), dim=1)
    lse = torch.logsumexp(logits.double(), dim=1)
    assert asked.next_ids_N is not None and asked.gather_ids_NG is not None
    assert targets.ids is not None and targets.logprobs is not None and targets.log_z is not None
    ids = torch.from_numpy(targets.ids.astype(np.int64))
    assert torch.equal(logits.gather(1, ids), logits.topk(16).values)
    np.testing.assert_array_equal(targets.logprobs, truth.gather(1, ids).half().numpy().clip(max=0))
    np.testing.assert_allclose(targets.lse, lse, rtol=2e-7)
    np.testing.assert_allclose(targets.next_logprob[:-1], truth.gather(1, asked.next_ids_N[:-1, None])[:, 0], atol=3e-6)
    np.testing.assert_allclose(targets.gather_logprobs, truth.gather(1, asked.gather_ids_NG).half(), rtol=1e-3)
    for i, t in enumerate(TEMPERATURES):
        log_z = torch.logsumexp(logits.double() / t, dim=1) - lse / t
        np.testing.assert_allclose(targets.log_z[:, i], log_z, atol=2e-6)
    assert np.isnan(targets.next_logprob[-1]) and targets.log_z[0, 0] == 0 and not np.signbit(targets.log_z[0, 0])
    tokens_T = np.append(0, asked.next_ids_N[:-1].numpy())
    check_targets(targets, Query(tokens_T, (0, n), ALL, asked.gather_ids_NG.numpy()), vocab_size)


@given(
    n=st.integers(1, 6), vocab_size=st.integers(2, 2000), block=st.sampled_from([4, 32, 64]),
    seed=st.integers(0, 2**31), levels=st.integers(1, 50), data=st.data(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_top_k_by_blocks_is_top_k(n: int, vocab_size: int, block: int, seed: int, levels: int, data: Any) -> None:
    """With any number of ties: the values are those of a full sort, the ids differ and hold them."""
    k = data.draw(st.integers(1, max(1, vocab_size // data.draw(st.sampled_from([1, 8, 4 * block])))))
    logits = torch.randint(levels, (n, vocab_size), generator=torch.Generator().manual_seed(seed)).float()
    filled_up = torch.nn.functional.pad(logits, (0, -vocab_size % block), value=-torch.inf)
    with patch("teacher_proto.compute.top_k.BLOCK", block):
        values, ids = top_k(logits, k, filled_up.view(n, -1, block).amax(dim=-1))
    assert torch.equal(values, logits.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_chunks_do_not_change_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = draw_logits(16 if INTERPRETED else 70, 900)
    whole, _ = record(logits)
    monkeypatch.setitem(reduction.HEAD_ROWS, "cpu", 13)
    monkeypatch.setitem(reduction.FLOAT_BYTES, "cpu", 4 * 4 * 928)
    pieces, _ = record(logits)
    for name, array in whole.tensors().items():
        np.testing.assert_array_equal(array, pieces.tensors()[name], err_msg=name)


def test_the_chunks_of_an_accelerator_do_not_change_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = draw_logits(20, 900)
    here, _ = record(logits)
    for sizes in ("HEAD_ROWS", "FLOAT_BYTES"):
        monkeypatch.setattr(reduction, sizes, {})  # none for this device, as for any but a CPU
    monkeypatch.setattr(reduction, "HEAD_ROWS_ACCELERATOR", 9)
    monkeypatch.setattr(reduction, "FLOAT_BYTES_ACCELERATOR", 4 * 5 * 928)
    there, _ = record(logits)
    for name, array in here.tensors().items():
        np.testing.assert_array_equal(array, there.tensors()[name], err_msg=name)


@pytest.mark.parametrize("asked", [(), (1.0,), (2.0,), (5.0, 2.0), (0.5,)])
def test_a_figure_does_not_depend_on_what_else_is_asked_for(asked: tuple[float, ...]) -> None:
    """So that what a store holds answers, to the bit, whoever asks for less."""
    logits = draw_logits(5 if INTERPRETED else 40, 3000)
    more, _ = record(logits)
    less, _ = record(logits, replace(ALL, kinds=("top_k",), temperatures=asked, num_samples=0, hidden_dtype=None))
    assert more.log_z is not None and less.log_z is not None
    for name in ("ids", "logprobs", "lse", "next_logprob"):
        np.testing.assert_array_equal(getattr(more, name), getattr(less, name), err_msg=name)
    np.testing.assert_array_equal(more.log_z[:, [TEMPERATURES.index(t) for t in asked]], less.log_z)


def test_a_gpu_takes_more_rows_through_the_head_at_a_time_than_a_cpu() -> None:
    assert [reduction.chunk_rows(torch.device(name)) for name in ("cpu", "cuda", "cuda:3")] == [256, 1024, 1024]


def test_nan_stays_nan_in_its_row_alone() -> None:
    logits = draw_logits(8, 520)
    clean, _ = record(logits)
    logits[3, 100] = torch.nan
    targets, _ = record(logits)
    for name in ("lse", "next_logprob", "log_z", "logprobs", "gather_logprobs"):
        bad = np.isnan(getattr(targets, name)).reshape(8, -1).any(axis=1)
        assert bad[3] and not bad[[0, 1, 2, 4, 5, 6]].any()
    for name in ("ids", "logprobs", "lse"):
        keep = [0, 1, 2, 4, 5, 6, 7]
        np.testing.assert_array_equal(getattr(targets, name)[keep], getattr(clean, name)[keep])
    assert targets.ids is not None and targets.ids.max() < 520


def test_logprobs_below_fp16_are_held_at_its_smallest_number() -> None:
    logits = torch.zeros(2, 64)
    logits[:, 1:] = -1e6
    logits[:, 2] = -torch.inf
    targets, _ = record(logits, replace(ALL, kinds=("top_k",), top_k=64, num_samples=0))
    assert targets.logprobs is not None
    assert targets.logprobs[0, 0] == 0 and (targets.logprobs[:, 1:] == np.finfo(np.float16).min).all()


def test_a_peaked_row_has_no_positive_logprob() -> None:
    logits = torch.tensor([[30.0, 0.0, -5.0] + [-40.0] * 61, [1e4] + [0.0] * 63])
    targets, _ = record(logits, replace(ALL, kinds=("top_k",), top_k=4, temperatures=(1e-3, 1e3)))
    assert targets.logprobs is not None and (targets.logprobs <= 0).all()
    assert np.isfinite(targets.log_z).all()


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    """Six standard errors over 200,000 draws of one distribution, at 400 positions."""
    logits = draw_logits(1, 40).expand(400, 40)
    spec = replace(ALL, kinds=("sampled",), num_samples=500, sample_temperature=temperature)
    targets, _ = record(logits, spec)
    assert targets.sampled_ids is not None and targets.sampled_counts is not None
    counts = np.bincount(targets.sampled_ids, weights=targets.sampled_counts, minlength=40)
    p = torch.softmax(logits[0].double() / temperature, dim=0).numpy()
    error = np.sqrt(200_000 * p * (1 - p)) + 1e-9
    assert counts.sum() == 200_000 and (abs(counts - 200_000 * p) < 6 * error + 1).all()


def test_draws_of_other_positions_seeds_and_tokens_are_independent() -> None:
    """Noise under neighbouring counters is uncorrelated: |r| below 5 standard errors."""
    keys = torch.tensor([sample_key(seed, np.arange(3) + shift) for seed in (0, 1) for shift in (0, 1)])
    noise = uniform_noise(keys.repeat(2), torch.tensor([0] * 4 + [1] * 4), 20_000)
    correlation = np.corrcoef(noise.numpy())[np.triu_indices(8, 1)]
    assert abs(correlation).max() < 5 / np.sqrt(20_000)
    assert abs(noise.mean(dim=1) - 0.5).max() < 5 / np.sqrt(12 * 20_000) and noise.min() >= 0 and noise.max() < 1
    serial = np.corrcoef(noise[0, 1:], noise[0, :-1])[0, 1]
    assert abs(serial) < 5 / np.sqrt(20_000)


def test_noise_is_splitmix64_of_key_position_and_draw() -> None:
    """Held to plain integer arithmetic, so that a stored answer can be reproduced on any device and version."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key, position = -5_000_000_000_000_000_001, 77
    state = mix((key + position * gamma) & mask)
    expected = [(mix((state + draw * gamma) & mask) >> 11) * 2.0**-53 for draw in (1, 2, 3)]
    assert uniform_noise(torch.tensor([key]), torch.tensor([position]), 3)[0].tolist() == expected
    assert (
        sample_key(7, np.array([1, 2, 3])) == sample_key(7, np.array([1, 2, 3], dtype=np.int32)) != sample_key(8, [1])
    )


def test_hidden_states_travel_within_their_format_s_rounding() -> None:
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)) * 10
    hidden[4] = 0
    half = reduction.pack_hidden(hidden, "float16")["hidden"].float()
    bfloat = reduction.pack_hidden(hidden, "bfloat16")["hidden"].float()
    int8 = reduction.pack_hidden(hidden, "int8")
    assert ((half - hidden).abs() <= hidden.abs() * 2**-11 + 1e-7).all()
    assert ((bfloat - hidden).abs() <= hidden.abs() * 2**-8).all()
    assert torch.equal(int8["hidden_scale"], hidden.abs().amax(dim=1) / 127) and (int8["hidden"][4] == 0).all()
    widened = int8["hidden"].float() * int8["hidden_scale"][:, None]
    assert ((widened - hidden).abs() <= int8["hidden_scale"][:, None] * 0.5001).all()
    assert reduction.pack_hidden(torch.tensor([[1e6, -1e6]]), "float16")["hidden"].tolist() == [[65504, -65504]]


def test_a_rank_without_logits_gives_no_rows() -> None:
    layout = RowLayout(TargetSpec(kinds=("score",)), 64)
    calls = []
    assert reduce_rows(torch.zeros(600, 4), lambda h: calls.append(len(h)), Rows(), layout) is None
    assert calls == [256, 256, 88]


def test_rows_of_another_length_are_refused() -> None:
    layout = RowLayout(replace(ALL, kinds=("top_k",)), 512)
    with pytest.raises(ValueError, match="expected uint8"):
        unpack_rows(np.zeros((3, layout.row_bytes + 1), dtype=np.uint8), 0, layout)


def test_bytes_a_row_are_the_wire_s() -> None:
    spec = TargetSpec(kinds=("top_k",), top_k=64, temperatures=(5.0,))
    assert RowLayout(spec, 49_152).row_bytes == 64 * 4 + 12 and RowLayout(spec, 151_936).row_bytes == 64 * 5 + 12


def test_counting_draws_keeps_each_id_once_a_row() -> None:
    ragged = count_draws(np.array([[3, 3, 3, 9], [9, 9, 10, 11], [0, 0, 0, 0]], dtype=np.uint16))
    assert ragged["sampled_offsets"].tolist() == [0, 2, 5, 6]
    assert ragged["sampled_ids"].tolist() == [3, 9, 9, 10, 11, 0]
    assert ragged["sampled_counts"].tolist() == [3, 1, 2, 1, 1, 4]
