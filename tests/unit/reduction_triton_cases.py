"""The kernels of `reduction_triton`, in Triton's interpreter, against dense float64 and stable sorts.

No file that pytest finds by itself: `test_reduction_triton.py` runs it in a process where `TRITON_INTERPRET` is set.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from teacher_proto import hardware
from teacher_proto.compute import reduction_kernels
from teacher_proto.compute.reduction_triton import SEGMENT, ReducedRows, reduce_in_one_pass
from teacher_proto.requests import TargetSpec
from tests.unit.test_reduction import draw_logits, record

TEMPERATURES = (5.0, 1.0, 2.0, 0.5, 1e-3)


def reduced(logits_NV: torch.Tensor, k: int, temperatures: tuple[float, ...] = TEMPERATURES) -> ReducedRows:
    """The figures, held to float64 and to a stable sort, which among equal logits keeps the lower id in front."""
    generator = torch.Generator().manual_seed(1)
    next_N = torch.randint(logits_NV.shape[1], (len(logits_NV),), generator=generator)
    figures = reduce_in_one_pass(logits_NV, next_N, temperatures, k)
    z_NV = logits_NV.double()
    lse_N = z_NV.logsumexp(dim=1)
    torch.testing.assert_close(figures.lse_N.double(), lse_N, rtol=2e-7, atol=2e-6)
    log_z_NT = torch.stack([(z_NV / t).logsumexp(dim=1) - lse_N / t for t in temperatures], dim=1)
    torch.testing.assert_close(figures.log_z_NT.double(), log_z_NT, rtol=2e-6, atol=2e-6)
    assert figures.next_logprob_N is not None
    next_logprob_N = z_NV.gather(1, next_N[:, None])[:, 0] - lse_N
    torch.testing.assert_close(figures.next_logprob_N.double(), next_logprob_N, rtol=2e-7, atol=3e-6)
    if k:
        values_NK, ids_NK = (logits_NV.float() + 0.0).sort(dim=1, descending=True, stable=True)
        assert figures.ids_NK is not None and figures.logprobs_NK is not None
        assert torch.equal(figures.ids_NK.long(), ids_NK[:, :k])
        logprobs_NK = (values_NK[:, :k].double() - lse_N[:, None]).clamp(min=-65504.0, max=0.0).half()
        torch.testing.assert_close(figures.logprobs_NK, logprobs_NK, rtol=2**-10, atol=3e-6)
    return figures


@pytest.mark.parametrize("k", [0, 1, 16, 64, 256, 300])
def test_several_segments_with_a_rest_behind_the_last_block(k: int) -> None:
    reduced(draw_logits(2, 2 * SEGMENT + 1037), k)


@pytest.mark.parametrize("k", [7, 64, 256, 300])
@pytest.mark.parametrize("levels", [1, 3, 40])
def test_among_equal_logits_the_lower_id_comes_first(k: int, levels: int) -> None:
    logits_NV = torch.randint(levels, (2, 3001), generator=torch.Generator().manual_seed(k)).float() - 1
    logits_NV[logits_NV == 0] *= -1.0  # -0, which is 0
    logits_NV[0, ::2].abs_()
    reduced(logits_NV, k)


def test_the_largest_may_all_lie_in_one_block_or_one_in_each() -> None:
    rising, blocks = torch.arange(5000.0), torch.arange(5000.0).roll(64) % 64
    reduced(torch.stack([rising, rising.flip(0), blocks]) / 300, 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_widened(dtype: torch.dtype) -> None:
    reduced(draw_logits(2, 5003).to(dtype), 64)


@pytest.mark.parametrize("k", [5, 300])
def test_rows_may_lie_apart_and_in_any_order(k: int) -> None:
    """As vLLM's do where it pads the vocabulary: what lies between is never read."""
    padded_NV = torch.full((3, 1024), torch.nan)
    padded_NV[:, :1001] = draw_logits(3, 1001)
    reduced(padded_NV[:, :1001], k)
    reduced(draw_logits(1001, 3).T, k)


def test_extreme_logits() -> None:
    logits_NV = draw_logits(6, 1500)
    logits_NV[0, 100:] = -math.inf
    logits_NV[1, :1200] = -math.inf  # the first tile
    logits_NV[2] *= 1e4
    logits_NV[3] -= 3e4
    logits_NV[4] = 0.0
    logits_NV[5] = -1e30
    logits_NV[5, 1400] = 1e30
    reduced(logits_NV, 64, temperatures=(1.0, 2.0, 5.0))


def test_a_row_without_a_number_is_nan_and_its_neighbours_are_not() -> None:
    logits_NV = draw_logits(4, 1500)
    logits_NV[1] = torch.nan
    logits_NV[2] = -math.inf
    logits_NV[3, 7] = math.inf
    figures = reduce_in_one_pass(logits_NV, torch.zeros(4, dtype=torch.int64), (2.0,), 4)
    for column in (figures.lse_N, figures.log_z_NT[:, 0], figures.logprobs_NK[:, 0]):  # type: ignore[index]
        assert column.isnan().tolist() == [False, True, True, True]
    assert figures.ids_NK is not None and ((figures.ids_NK >= 0) & (figures.ids_NK < 1500)).all()
    assert all(len(set(row)) == 4 for row in figures.ids_NK.tolist())


def test_draws_are_those_of_the_passes_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV = draw_logits(5, 900)
    spec = TargetSpec(kinds=("sampled", "gather"), num_samples=50, sample_temperature=2.0, temperatures=(5.0,))
    answers = []
    for kernels in (True, False):
        monkeypatch.setattr(hardware, "runs_triton", lambda device, answer=kernels: answer)
        answers.append(record(logits_NV, spec)[0])
    for name in ("sampled_ids", "sampled_counts", "sampled_offsets"):
        np.testing.assert_array_equal(getattr(answers[0], name), getattr(answers[1], name))
    np.testing.assert_allclose(answers[0].gather_logprobs, answers[1].gather_logprobs, rtol=2**-10)


def test_a_row_is_the_same_alone_and_among_others() -> None:
    logits_NV = draw_logits(3, 2000)
    together, alone = reduced(logits_NV, 16), reduced(logits_NV[1:2], 16)
    for name in ("lse_N", "log_z_NT", "ids_NK", "logprobs_NK"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name)), name


def test_the_figures_do_not_depend_on_what_else_is_asked_for() -> None:
    logits_NV = draw_logits(2, 3000)
    much, little = reduced(logits_NV, 64), reduced(logits_NV, 0, (5.0,))
    assert torch.equal(much.lse_N, little.lse_N) and torch.equal(much.log_z_NT[:, :1], little.log_z_NT)
    assert little.ids_NK is None and replace(little, ids_NK=None) == little
    assert reduce_in_one_pass(logits_NV, None, (), 0).next_logprob_N is None


def test_this_is_the_interpreter() -> None:
    assert type(reduction_kernels.stream).__name__ == "InterpretedFunction"
