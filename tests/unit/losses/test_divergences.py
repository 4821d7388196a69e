"""Every divergence on every kind of target: dense float64 autograd, TRL's and Liger's chunked forms as oracles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from student_trainer.losses import Head, TeacherRows, head_loss, token_term
from student_trainer.targets.student_support import student_top_ids
from tests.unit.losses import dense

KINDS = ["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "tvd"]
TEMPERATURES = [1.0, 2.0, 5.0]
N, V, D, E = 26, 75, 18, 11


def random_pair() -> tuple[list[Tensor], Tensor, Head, Tensor]:
    """Student leaves (hidden, weight, bias), the teacher's hidden states and head, and the teacher's logits."""
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((N, D), (V, D), (V,))]
    teacher_hidden_NE = torch.randn(N, E, dtype=torch.float64)
    head = Head(torch.randn(V, E, dtype=torch.float64), torch.randn(V, dtype=torch.float64))
    return leaves, teacher_hidden_NE, head, dense.logits(teacher_hidden_NE, head.weight_VD, head.bias_V)


def served(support: str, teacher_NV: Tensor, hidden_NE: Tensor, head: Head, own_ids_NG: Tensor) -> TeacherRows:
    rows = dense.rows_of(teacher_NV, 9, (2.0, 5.0))
    gathered_NG = teacher_NV.log_softmax(-1).gather(1, own_ids_NG)
    return dataclasses.replace(
        rows,
        ids_NK=rows.ids_NK if support == "top_k" else None,
        gather_ids_NG=own_ids_NG,
        gather_logprobs_NG=gathered_NG,
        teacher_hidden_NE=hidden_NE,
        teacher_head=head,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("support", "tail"),
    [
        ("top_k", "bucket"),
        ("top_k", "renormalise"),
        ("gather", "bucket"),
        ("gather", "renormalise"),
        ("full", "bucket"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_the_dense_ones(kind: str, support: str, tail: str, temperature: float) -> None:
    leaves, hidden_NE, head, teacher_NV = random_pair()
    own_ids_NG = student_top_ids(leaves[0], leaves[1], 8, head_bias_V=leaves[2])
    rows = served(support, teacher_NV, hidden_NE, head, own_ids_NG)
    terms = [
        dense.term_of(kind, 1.7, temperature=temperature, tail=tail, beta=0.3, alpha=0.2, support=support),
        token_term("ce", "cross_entropy", 0.4),
    ]
    labels_N = torch.randint(V, (N,))
    ids_NK = {"top_k": rows.ids_NK, "gather": own_ids_NG, "full": None}[support]
    result = head_loss(*leaves[:2], labels_N, rows, terms, head_bias_V=leaves[2], chunk_rows=10)
    student_NV = dense.logits(*leaves)
    values = [
        dense.term_values(term, student_NV, labels_N, teacher_NV, None if ids_NK is None else ids_NK.long())
        for term in terms
    ]
    for term, value_N in zip(terms, values, strict=True):
        torch.testing.assert_close(result.per_term[term.name], value_N.detach(), rtol=1e-7, atol=1e-9)
    expected = 1.7 * values[0].sum() + 0.4 * values[1].sum()
    for ours, theirs in zip(
        torch.autograd.grad(result.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_student_equal_to_teacher_gives_zero_for_every_divergence(kind: str, temperature: float) -> None:
    """With logprobs rounded as on the wire, on every support, value and gradient."""
    teacher_NV = torch.randn(40, 300) * 4
    rows = dense.rows_of(teacher_NV, 24, (2.0, 5.0), torch.float16)
    identity = torch.eye(300)
    rows = dataclasses.replace(
        rows,
        gather_ids_NG=rows.ids_NK,
        gather_logprobs_NG=rows.logprobs_NK,
        teacher_hidden_NE=teacher_NV,
        teacher_head=Head(identity),
    )
    # The total variation is linear in the rounding error, the others quadratic.
    bound = 2e-3 if kind == "tvd" else 2e-4
    for support in ("top_k", "gather", "full"):
        for tail in ("bucket", "renormalise"):
            term = token_term("kd", kind, 1.0, temperature=temperature, tail=tail, support=support)
            right, wrong = (
                head_loss(student_NV, identity, torch.zeros(40, dtype=torch.long), rows, [term]).per_term["kd"]
                for student_NV in (teacher_NV, teacher_NV.roll(1, 1))
            )
            assert float(right.mean().abs()) < bound, (support, tail)
            assert float(wrong.mean()) > 20 * bound, (support, tail)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("jsd", 0.3), ("reverse_kl", 1.0)])
def test_full_vocabulary_agrees_with_trl_chunked(kind: str, beta: float, temperature: float) -> None:
    """TRL's ChunkedDivergenceFunction, soft caps and logit scales included."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    leaves, hidden_NE, head, _ = random_pair()
    leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    assert head.bias_V is not None
    head = Head(head.weight_VD.float(), head.bias_V.float(), softcap=9.0, scale=0.8)
    rows = TeacherRows(teacher_hidden_NE=hidden_NE.float(), teacher_head=head)
    term = dense.term_of(kind, temperature=temperature, beta=beta, support="full")
    labels_N = torch.zeros(N, dtype=torch.long)
    ours = head_loss(
        *leaves[:2], labels_N, rows, [term], head_bias_V=leaves[2], logit_softcap=7.0, logit_scale=1.5, chunk_rows=7
    )
    theirs_N, _entropy = ChunkedDivergenceFunction.apply(
        *leaves, rows.teacher_hidden_NE, head.weight_VD, head.bias_V, beta, temperature, 1.5, 7.0, 0.8, 9.0
    )
    torch.testing.assert_close(ours.per_term["kd"], theirs_N.detach(), rtol=1e-4, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(ours.total, leaves), torch.autograd.grad(theirs_N.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("jsd", 0.7), ("reverse_kl", 1.0)])
def test_cross_entropy_and_full_vocabulary_agree_with_liger(kind: str, beta: float, temperature: float) -> None:
    """Liger's fused linear JSD: a mean over labelled rows, no T^2."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is a test-only oracle")
    leaves, hidden_NE, head, _ = random_pair()
    leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    assert head.bias_V is not None
    head = Head(head.weight_VD.float(), head.bias_V.float())
    labels_N = torch.randint(V, (N,))
    labels_N[::4] = -100
    peer = liger.LigerFusedLinearJSDLoss(0.4, 0.6, beta, temperature=temperature, compiled=False, chunk_size=8)
    theirs = peer(*leaves[:2], hidden_NE.float(), head.weight_VD, labels_N, leaves[2], head.bias_V)
    terms = [
        token_term("ce", "cross_entropy", 0.4),
        dense.term_of(kind, 0.6, temperature=temperature, beta=beta, support="full"),
    ]
    rows = TeacherRows(teacher_hidden_NE=hidden_NE.float(), teacher_head=head)
    result = head_loss(*leaves[:2], labels_N, rows, terms, head_bias_V=leaves[2])
    ours = result.total / result.count("ce")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for got, want in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["forward_kl", "tcs"])
def test_a_truncated_divergence_is_the_sum_over_the_named_ids_alone(kind: str, temperature: float) -> None:
    """Against autograd in float64: neither side is renormalised, and the rest has no part in value or gradient."""
    leaves, _, _, teacher_NV = random_pair()
    rows = dense.rows_of(teacher_NV, 16, tuple({1.0, temperature}), torch.float64)
    term = token_term("kd", kind, 1.0, temperature=temperature, tail="truncate")
    ours = head_loss(*leaves[:2], torch.zeros(N, dtype=torch.long), rows, [term], head_bias_V=leaves[2])
    assert rows.ids_NK is not None
    ids_NK = rows.ids_NK.long()
    z_NV = leaves[0] @ leaves[1].T + leaves[2]
    log_q_NK, log_p_NK = ((z / temperature).log_softmax(-1).gather(1, ids_NK) for z in (z_NV, teacher_NV))
    theirs_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    torch.testing.assert_close(ours.per_term["kd"], theirs_N.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    for got, want in zip(
        torch.autograd.grad(ours.total, leaves), torch.autograd.grad(theirs_N.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_many_terms_and_temperatures_in_one_call_are_the_sum_of_single_calls() -> None:
    leaves, hidden_NE, head, teacher_NV = random_pair()
    own_ids_NG = student_top_ids(*leaves[:2], 8, head_bias_V=leaves[2])
    rows = served("top_k", teacher_NV, hidden_NE, head, own_ids_NG)
    terms = [
        token_term("ce", "cross_entropy", 0.5),
        token_term("kl", "top_k_kl", 1.0),
        token_term("tvd", "tvd", 0.3, tail="renormalise"),
        token_term("soft", "forward_kl", 2.0, temperature=5.0, temperature_squared=True),
        token_term("own", "reverse_kl", 0.7, support="gather"),
        token_term("whole", "jsd", 0.9, temperature=2.0, support="full"),
    ]
    labels_N = torch.randint(V, (N,))
    together = head_loss(*leaves[:2], labels_N, rows, terms, head_bias_V=leaves[2])
    singles = [head_loss(*leaves[:2], labels_N, rows, [term], head_bias_V=leaves[2]) for term in terms]
    for term, single in zip(terms, singles, strict=True):
        torch.testing.assert_close(together.per_term[term.name], single.per_term[term.name], rtol=1e-9, atol=1e-12)
    total = sum(single.total for single in singles)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(together.total, total, rtol=1e-10, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(together.total, leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_jsd_is_the_same_from_either_side_at_one_half() -> None:
    """A symmetry that no slope enters: swapping teacher and student leaves the value."""
    first_NV, second_NV = (torch.randn(10, 60, dtype=torch.float64) for _ in range(2))
    identity, labels_N = torch.eye(60, dtype=torch.float64), torch.zeros(10, dtype=torch.long)
    values = [
        head_loss(
            student_NV,
            identity,
            labels_N,
            TeacherRows(teacher_hidden_NE=teacher_NV, teacher_head=Head(identity)),
            [token_term("jsd", "jsd", 1.0, support="full")],
        ).per_term["jsd"]
        for student_NV, teacher_NV in ((first_NV, second_NV), (second_NV, first_NV))
    ]
    torch.testing.assert_close(values[0], values[1])
