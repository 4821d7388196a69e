"""The head's products in bf16: where a device computes in it, and both ways of adding up, each forced on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from student_trainer.losses import Head, HeadLoss, TeacherRows, head_loss, projection, token_term
from student_trainer.targets.student_support import student_top_ids

ROWS, VOCAB, WIDTH = 24, 90, 16
TERMS = [token_term("ce", "cross_entropy", 0.7), token_term("whole", "jsd", 1.0, support="full")]


@pytest.fixture(params=[True, False])
def computes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the device is said to have arithmetic for bf16."""
    monkeypatch.setattr(projection, "computes_bfloat16", lambda device: request.param)
    return bool(request.param)


@pytest.fixture(params=[True, False])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Products with float32 results, as a GPU has them; the dtypes of their factors. With and without `addmm`'s."""
    factors: list[torch.dtype] = []
    mm = torch.mm

    def wide_mm(a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Tensor | None = None) -> Tensor:
        factors.extend((a.dtype, b.dtype))
        if out_dtype is not None:
            a, b = a.to(out_dtype), b.to(out_dtype)
        return mm(a, b) if out is None else mm(a, b, out=out)

    def wide_addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any, out: Tensor) -> Tensor:
        if not request.param:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        factors.extend((a.dtype, b.dtype))
        return out.copy_(total + mm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(projection, "computes_bfloat16", lambda device: True)
    monkeypatch.setattr(projection, "multiplies_into_float32", lambda device: True)
    projection.adds_into_float32.cache_clear()
    yield factors
    assert projection.adds_into_float32(torch.device("cpu")) is request.param
    projection.adds_into_float32.cache_clear()


def leaves(round_to: torch.dtype | None = None) -> list[Tensor]:
    make = torch.Generator().manual_seed(3)
    made = [torch.randn(*shape, generator=make) for shape in ((ROWS, WIDTH), (VOCAB, WIDTH), (ROWS, 8), (VOCAB, 8))]
    return made if round_to is None else [leaf.to(round_to).to(leaf.dtype) for leaf in made]


def loss(x: list[Tensor], **options: Any) -> tuple[HeadLoss, list[Tensor]]:
    hidden_ND, weight_VD = (leaf.requires_grad_() for leaf in x[:2])
    teacher = TeacherRows(teacher_hidden_NE=x[2], teacher_head=Head(x[3]))
    found = head_loss(hidden_ND, weight_VD, torch.arange(ROWS), teacher, TERMS, chunk_rows=7, **options)
    return found, list(torch.autograd.grad(found.total, (hidden_ND, weight_VD)))


def test_a_cpu_rounds_the_gradient_and_no_logit(computes: bool) -> None:
    """So does one that does not compute in bf16, slowly: a run that began in it elsewhere goes on bit for bit."""
    wide, wide_gradients = loss(leaves())
    low, low_gradients = loss(leaves(), compute=torch.bfloat16)
    for name, values_N in wide.per_term.items():
        assert torch.equal(low.per_term[name], values_N)
    for got, want in zip(low_gradients, wide_gradients, strict=True):
        assert got.dtype == torch.float32
        assert not torch.equal(got, want)
        torch.testing.assert_close(got, want, rtol=0, atol=2**-7 * float(want.abs().max()))


def test_a_gpu_multiplies_in_bf16_and_adds_up_in_float32(gpu: list[torch.dtype]) -> None:
    """Nothing is rounded but the factors: with hidden states and weights that bf16 has, values are float32's."""
    low, low_gradients = loss(leaves(torch.bfloat16), compute=torch.bfloat16)
    assert gpu and set(gpu) == {torch.bfloat16}, "the teacher's head for support=full is no exception"
    exact = [leaf.double() for leaf in leaves(torch.bfloat16)]
    wide, wide_gradients = loss(exact)
    for name, values_N in wide.per_term.items():
        torch.testing.assert_close(low.per_term[name].double(), values_N, rtol=1e-5, atol=1e-5)
    for got, want in zip(low_gradients, wide_gradients, strict=True):
        # Of the gradient by the logits each number is off by 2^-9 of itself at most.
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2**-8 * float(want.abs().max()))


def test_float32_is_multiplied_as_float32_on_a_gpu(gpu: list[torch.dtype]) -> None:
    loss(leaves())
    assert set(gpu) == {torch.float32}


def test_likeliest_ids_are_found_in_the_dtype_of_the_student(gpu: list[torch.dtype]) -> None:
    hidden_ND, weight_VD = leaves(torch.bfloat16)[:2]
    ids_NK = student_top_ids(hidden_ND, weight_VD, 5, compute=torch.bfloat16)
    assert set(gpu) == {torch.bfloat16}
    assert torch.equal(ids_NK, (hidden_ND @ weight_VD.T).topk(5, -1).indices)


def test_a_cpu_has_neither() -> None:
    device = torch.device("cpu")
    assert not projection.multiplies_into_float32(device) and projection.multiplies_into_float32(torch.device("cuda"))
    projection.adds_into_float32.cache_clear()
    assert not projection.adds_into_float32(device)
