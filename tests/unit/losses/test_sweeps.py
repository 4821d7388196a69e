"""The GPU's way through the vocabulary against the CPU's: same normaliser, same product, wherever a block lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from student_trainer.losses import TokenTerm, chunks, sweeps, token_term
from student_trainer.losses.head import head_loss
from tests.unit.losses import dense

ROWS, BLOCK_ROWS, WIDTH, DEPTH = 60, 22, 131, 16
# One pass, whose gradient may be written over the logits; and several, whose gradients are added up.
TERMS = (
    (token_term("ce", "cross_entropy", 0.5), token_term("kl", "top_k_kl", 1.0)),
    (
        token_term("ce", "cross_entropy", 0.5),
        token_term("kl", "top_k_kl", 1.0),
        token_term("jsd", "jsd", 1.0, temperature=3.0),
    ),
)


@pytest.fixture(params=["as written", "aot_eager", "inductor"])
def on_gpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sweeps take the way of a GPU: as plain functions, as AOTAutograd rewrites them, through the whole compiler."""

    @cache
    def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return function if request.param == "as written" else torch.compile(function, backend=request.param)

    monkeypatch.setattr(sweeps, "compiled", compiled)
    monkeypatch.setattr(sweeps, "makes_softmax_again", lambda z_NW: True)
    yield
    torch.compiler.reset()


def blocks_of(z_CV: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks of a chunk as the walk cuts them: each at another offset, the last one shorter."""
    for start in range(0, len(z_CV), BLOCK_ROWS):
        yield z_CV[start : start + BLOCK_ROWS]


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("width", [WIDTH, WIDTH - 8])
def test_sweeps_agree_with_softmax_at_every_offset(overwrite: bool, width: int) -> None:
    torch.manual_seed(0)
    for temperature in (1.0, 3.0):
        z_CV = torch.randn(ROWS, WIDTH) * 4
        z_CV.scatter_(1, torch.randint(width, (ROWS, 9)), sweeps.HOLE)
        row_C, before_CV = torch.randn(ROWS), z_CV.clone()
        for place, z_BV in enumerate(blocks_of(z_CV)):
            z_BW, row_B = z_BV[:, :width], row_C[place * BLOCK_ROWS :][: len(z_BV)]
            holes_BW, expected_BW = z_BW == sweeps.HOLE, (z_BW / temperature).softmax(-1) * row_B[:, None]
            swept = sweeps.sweep_in(z_BW, temperature)
            torch.testing.assert_close(swept.lse_N, (z_BW / temperature).logsumexp(-1))
            out_BW = sweeps.sweep_out(swept, z_BW, temperature, row_B, overwrite=overwrite)
            torch.testing.assert_close(out_BW, expected_BW)
            assert not bool(out_BW[holes_BW].any())
            assert (out_BW.data_ptr() == z_BW.data_ptr()) == overwrite
        assert torch.equal(z_CV[:, width:], before_CV[:, width:])
        assert overwrite or torch.equal(z_CV, before_CV)


def test_sweeps_on_a_cpu_agree_with_softmax() -> None:
    z_NW, row_N = torch.randn(5, WIDTH) * 4, torch.randn(5)
    for overwrite in (False, True):
        swept = sweeps.sweep_in(z_NW, 3.0)
        expected_NW = (z_NW / 3.0).softmax(-1) * row_N[:, None]
        torch.testing.assert_close(sweeps.sweep_out(swept, z_NW, 3.0, row_N, overwrite=overwrite), expected_NW)


def gradients(terms: tuple[TokenTerm, ...], softcap: float | None) -> list[torch.Tensor]:
    """Values of a loss and its gradients by hidden states and weight, from fixed inputs."""
    make = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(ROWS, DEPTH, generator=make).requires_grad_()
    weight_VD = torch.randn(WIDTH, DEPTH, generator=make).requires_grad_()
    teacher = dense.rows_of(torch.randn(ROWS, WIDTH, generator=make) * 3, 7, (3.0,))
    labels_N = torch.randint(WIDTH, (ROWS,), generator=make)
    loss = head_loss(hidden_ND, weight_VD, labels_N, teacher, terms, logit_softcap=softcap)
    loss.total.backward()
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    return [loss.total.detach(), hidden_ND.grad, weight_VD.grad]


@pytest.mark.usefixtures("on_gpu_path")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_of_a_chunk_of_several_blocks(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the gradient is written over the logits (one pass, no cap) or beside them, every block's is right."""
    monkeypatch.setattr(chunks, "CPU_BLOCK_ELEMENTS", BLOCK_ROWS * WIDTH)
    for terms in TERMS:
        on_gpu_path = gradients(terms, softcap)
        with monkeypatch.context() as patch:
            patch.setattr(sweeps, "makes_softmax_again", lambda z_NW: False)
            for one, other in zip(on_gpu_path, gradients(terms, softcap), strict=True):
                torch.testing.assert_close(one, other)
