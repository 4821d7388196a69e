"""`head_loss` against what others compute: the golden table, TRL, torch's cross-entropy, and float64 autograd."""

from __future__ import annotations

import pytest
import torch

from student_trainer.losses import Head, TeacherRows, TokenTerm, head_loss, token_term
from tests.unit.losses import dense

GOLDEN = {
    ("full", 1.0): 7.232754,
    ("full", 2.0): 2.208109,
    ("renormalise", 1.0): 2.987425,
    ("renormalise", 2.0): 0.915927,
    ("bucket", 1.0): 6.083938,
    ("bucket", 2.0): 1.032367,
    ("truncate", 1.0): 6.382877,
    ("truncate", 2.0): 1.296353,
}


def golden_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student_NV = torch.randn(16, 512, generator=generator) * 3
    return student_NV, torch.randn(16, 512, generator=generator) * 3


def loss_on_logits(student_NV: torch.Tensor, teacher: TeacherRows, term: TokenTerm) -> torch.Tensor:
    """The mean a row, with the student's logits handed in through a head that is the identity."""
    labels_N = torch.zeros(len(student_NV), dtype=torch.long)
    identity = torch.eye(student_NV.shape[1], dtype=student_NV.dtype)
    return head_loss(student_NV, identity, labels_N, teacher, [term]).total / len(student_NV)


@pytest.mark.parametrize(("form", "temperature"), GOLDEN)
def test_golden_table(form: str, temperature: float) -> None:
    student_NV, teacher_NV = golden_logits()
    teacher = dense.rows_of(teacher_NV, 16, (2.0,))
    if form == "full":
        teacher = TeacherRows(teacher_hidden_NE=teacher_NV, teacher_head=Head(torch.eye(512)))
        term = token_term("kl", "forward_kl", 1.0, temperature=temperature, support="full")
    else:
        term = token_term("kl", "top_k_kl", 1.0, temperature=temperature, tail=form)
    assert float(loss_on_logits(student_NV, teacher, term)) == pytest.approx(GOLDEN[form, temperature], abs=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_whole_vocabulary_agrees_with_trl(beta: float, temperature: float) -> None:
    """On K = V the served form is TRL's generalised JSD; TRL leaves T^2 out, and so does the term by default."""
    from trl.experimental.gkd import GKDTrainer

    student_NV, teacher_NV = (torch.randn(12, 96, dtype=torch.float64) * 3 for _ in range(2))
    expected = GKDTrainer.generalized_jsd_loss(
        student_NV[None], teacher_NV[None], beta=beta, temperature=temperature, reduction="sum"
    )
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    term = dense.term_of(kind, temperature=temperature, beta=beta)
    served = loss_on_logits(student_NV, dense.rows_of(teacher_NV, 96, (2.0, 5.0)), term)
    assert float(served) == pytest.approx(float(expected) / 12, rel=1e-6)


def test_cross_entropy_is_torchs() -> None:
    hidden_ND, weight_VD = torch.randn(40, 24), torch.randn(128, 24)
    labels_N = torch.randint(128, (40,))
    labels_N[::5] = -100
    result = head_loss(hidden_ND, weight_VD, labels_N, None, [token_term("ce", "cross_entropy", 1.0)])
    expected_N = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.T, labels_N, reduction="none")
    torch.testing.assert_close(result.per_term["ce"], expected_N)
    torch.testing.assert_close(result.total, expected_N.sum())
    assert int(result.count("ce")) == 32


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("squared", [False, True])
def test_gradients_are_those_of_the_dense_form(temperature: float, tail: str, squared: bool) -> None:
    """Cross-entropy and top-K KL together: values and gradients by hidden states, weight and bias."""
    terms = [
        token_term("ce", "cross_entropy", 0.7),
        token_term("kd", "top_k_kl", 1.3, temperature=temperature, tail=tail, temperature_squared=squared),
    ]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((30, 20), (90, 20), (90,))]
    hidden_ND, weight_VD, bias_V = leaves
    teacher_NV = torch.randn(30, 90, dtype=torch.float64) * 3
    labels_N = torch.randint(90, (30,))
    labels_N[3:6] = -100
    rows = dense.rows_of(teacher_NV, 7, (2.0, 5.0))
    result = head_loss(hidden_ND, weight_VD, labels_N, rows, terms, head_bias_V=bias_V, chunk_rows=8)
    student_NV = dense.logits(hidden_ND, weight_VD, bias_V)
    counts_N = labels_N != -100
    expected = sum(
        term.coefficient * dense.term_values(term, student_NV, labels_N, teacher_NV, rows.ids_NK.long())[counts_N].sum()  # type: ignore[union-attr]
        for term in terms
    )
    torch.testing.assert_close(result.total, expected.to(result.total.dtype), rtol=1e-9, atol=0)  # type: ignore[union-attr]
    ours = torch.autograd.grad(result.total * 0.25, leaves)
    theirs = torch.autograd.grad(expected * 0.25, leaves)  # type: ignore[operator]
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("support", ["top_k", "full"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_weights_of_rows_multiply_value_and_gradient_alike(kind: str, support: str) -> None:
    """A label that stands for 1/p others, one that stands for none, and terms of each way through the head."""
    terms = [
        token_term("ce", "cross_entropy", 0.7),
        token_term("kd", kind, 1.3, temperature=2.0, support=support, temperature_squared=True),
    ]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((30, 20), (90, 20), (90,))]
    hidden_ND, weight_VD, bias_V = leaves
    teacher_NV = torch.randn(30, 90, dtype=torch.float64) * 3
    labels_N = torch.randint(90, (30,))
    labels_N[3:6] = -100
    weights_N = 1.0 / torch.rand(30)
    weights_N[::7] = 0.0
    rows = dense.rows_of(teacher_NV, 7, (2.0,))
    if support == "full":
        rows = TeacherRows(teacher_hidden_NE=teacher_NV, teacher_head=Head(torch.eye(90, dtype=torch.float64)))
    result = head_loss(
        hidden_ND, weight_VD, labels_N, rows, terms, head_bias_V=bias_V, weights_N=weights_N, chunk_rows=8
    )
    plain = head_loss(hidden_ND, weight_VD, labels_N, rows, terms, head_bias_V=bias_V, chunk_rows=8)
    student_NV, counts_N = dense.logits(hidden_ND, weight_VD, bias_V), labels_N != -100
    ids_NK = None if rows.ids_NK is None else rows.ids_NK.long()
    values = [dense.term_values(term, student_NV, labels_N, teacher_NV, ids_NK) for term in terms]
    expected = torch.zeros((), dtype=torch.float64)
    for term, value_N in zip(terms, values, strict=True):
        expected = expected + term.coefficient * (weights_N.double() * value_N)[counts_N].sum()
        assert torch.equal(result.per_term[term.name], plain.per_term[term.name]), "values are told unweighted"
    torch.testing.assert_close(result.total, expected, rtol=1e-9, atol=0)
    for got, want in zip(torch.autograd.grad(result.total, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_weights_of_one_are_no_weights_to_the_bit() -> None:
    hidden_ND, weight_VD = torch.randn(40, 24, requires_grad=True), torch.randn(128, 24)
    labels_N, rows = torch.randint(128, (40,)), dense.rows_of(torch.randn(40, 128), 8)
    terms = [token_term("ce", "cross_entropy", 0.7), token_term("kd", "top_k_kl", 1.3)]
    without, ones = (
        torch.autograd.grad(head_loss(hidden_ND, weight_VD, labels_N, rows, terms, weights_N=w).total, hidden_ND)[0]
        for w in (None, torch.ones(40))
    )
    assert torch.equal(without, ones)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_student_equal_to_teacher_gives_zero(temperature: float, tail: str) -> None:
    """With the logprobs as the wire rounds them, and with gradients that vanish beside those of a wrong student."""
    teacher_NV = torch.randn(64, 400) * 4
    rows = dense.rows_of(teacher_NV, 16, (2.0, 5.0), torch.float16)
    term = token_term("kd", "top_k_kl", 1.0, temperature=temperature, tail=tail)
    assert abs(float(loss_on_logits(teacher_NV, rows, term))) < 1e-4
    assert float(loss_on_logits(teacher_NV.roll(1, 1), rows, term)) > 0.05
