"""Rows that do not count, vocabularies that differ, heads with bias, scale and cap, numbers at the edge of float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from student_trainer.losses import Head, TeacherRows, head_loss, token_term
from student_trainer.losses.supports import read_support, with_tail
from tests.unit.losses import dense

CE = token_term("ce", "cross_entropy", 0.5)
KD = token_term("kd", "top_k_kl", 1.0)
REVERSE = token_term("rkl", "reverse_kl", 0.3, temperature=2.0)


def case(n: int = 20, vocab: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden, weight, labels, teacher's logits), float64."""
    hidden_ND = torch.randn(n, 10, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(vocab, 10, dtype=torch.float64, requires_grad=True)
    return hidden_ND, weight_VD, torch.randint(vocab, (n,)), torch.randn(n, vocab, dtype=torch.float64) * 3


def test_rows_without_a_teacher_add_nothing_whatever_stands_there() -> None:
    hidden_ND, weight_VD, labels_N, teacher_NV = case()
    rows = dense.rows_of(teacher_NV, 6, (2.0,))
    rows = dataclasses.replace(rows, teacher_hidden_NE=teacher_NV, teacher_head=Head(torch.eye(64).double()))
    valid_N = torch.rand(20) < 0.5
    valid_N[0] = True
    terms = [CE, KD, REVERSE, token_term("full", "jsd", 1.0, support="full")]
    garbage = dataclasses.replace(
        rows,
        ids_NK=torch.where(valid_N[:, None], rows.ids_NK, 2**30),  # type: ignore[arg-type]
        logprobs_NK=torch.where(valid_N[:, None], rows.logprobs_NK, torch.nan),  # type: ignore[arg-type]
        log_z_NT=torch.where(valid_N[:, None], rows.log_z_NT, torch.inf),  # type: ignore[arg-type]
        teacher_hidden_NE=torch.where(valid_N[:, None], teacher_NV, torch.nan),
        valid_N=valid_N,
    )
    got = head_loss(hidden_ND, weight_VD, labels_N, garbage, terms)
    alone = head_loss(hidden_ND[valid_N], weight_VD, labels_N[valid_N], rows.select(valid_N), terms[1:])
    plain = head_loss(hidden_ND, weight_VD, labels_N, None, [CE])
    for name in ("kd", "rkl", "full"):
        assert not bool(got.per_term[name][~valid_N].any())
        torch.testing.assert_close(got.per_term[name][valid_N], alone.per_term[name])
        assert int(got.count(name)) == int(valid_N.sum())
    torch.testing.assert_close(got.total, alone.total + plain.total)
    leaves = (hidden_ND, weight_VD)
    for ours, theirs in zip(
        torch.autograd.grad(got.total, leaves), torch.autograd.grad(alone.total + plain.total, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_distillation_counts_rows_without_a_label_where_the_teacher_has_them() -> None:
    hidden_ND, weight_VD, labels_N, teacher_NV = case()
    labels_N[:8] = -100
    rows = dense.rows_of(teacher_NV, 6)
    with_label = head_loss(hidden_ND, weight_VD, labels_N, rows, [CE, KD])
    everywhere = dataclasses.replace(rows, valid_N=torch.ones(20, dtype=torch.bool))
    wherever_served = head_loss(hidden_ND, weight_VD, labels_N, everywhere, [CE, KD])
    assert (int(with_label.count("kd")), int(wherever_served.count("kd"))) == (12, 20)
    assert int(wherever_served.count("ce")) == 12
    assert bool((wherever_served.per_term["kd"][:8] > 0).all())


def test_no_row_at_all_gives_zero_and_zero_gradients() -> None:
    hidden_ND, weight_VD, labels_N, teacher_NV = case()
    labels_N[:] = -100
    result = head_loss(hidden_ND, weight_VD, labels_N, dense.rows_of(teacher_NV, 6), [CE, KD], want_top1=True)
    result.total.backward()
    assert float(result.total.detach()) == 0.0 and hidden_ND.grad is not None and weight_VD.grad is not None
    assert not bool(hidden_ND.grad.any()) and not bool(weight_VD.grad.any())
    assert result.top1_N is not None and bool((result.top1_N == -1).all())


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", ["top_k_kl", "reverse_kl", "jsd"])
def test_a_padded_student_head_is_compared_on_the_shared_ids_alone(kind: str, tail: str) -> None:
    """Distillation neither sees nor moves the student's own extra ids; cross-entropy presses them down."""
    hidden_ND, weight_VD, labels_N, teacher_NV = case()
    padded_VD = torch.cat([weight_VD.detach(), torch.randn(9, 10, dtype=torch.float64) * 4]).requires_grad_()
    term = token_term("kd", kind, 1.0, tail=tail)
    rows = dense.rows_of(teacher_NV, 6)
    small = head_loss(hidden_ND, weight_VD, labels_N, rows, [term])
    large = head_loss(hidden_ND, padded_VD, labels_N, rows, [term], shared_vocab=64)
    torch.testing.assert_close(large.per_term["kd"], small.per_term["kd"])
    (small_VD,) = torch.autograd.grad(small.total, weight_VD)
    (large_VD,) = torch.autograd.grad(large.total, padded_VD)
    torch.testing.assert_close(large_VD[:64], small_VD)
    assert not bool(large_VD[64:].any())
    both = head_loss(hidden_ND, padded_VD, labels_N, rows, [term, CE], shared_vocab=64)
    ce = head_loss(hidden_ND, padded_VD, labels_N, None, [CE])
    torch.testing.assert_close(both.total, large.total + ce.total)
    (both_VD,) = torch.autograd.grad(both.total, padded_VD)
    (ce_VD,) = torch.autograd.grad(ce.total, padded_VD)
    torch.testing.assert_close(both_VD, large_VD + ce_VD)


def test_a_larger_teacher_is_taken_given_the_shared_ids() -> None:
    """Equal logits on the shared ids give zero, however much mass the teacher has on ids of its own."""
    hidden_ND, weight_VD, labels_N, _ = case(vocab=64)
    shared_NV = dense.logits(hidden_ND, weight_VD).detach()
    teacher_NV = torch.cat([shared_NV, shared_NV.amax(-1, keepdim=True) + torch.randn(20, 3).double()], 1)
    for k in (1, 8, 67):
        rows = dense.rows_of(teacher_NV, k)
        assert bool((rows.ids_NK >= 64).any())  # type: ignore[operator]
        for tail in ("bucket", "renormalise"):
            term = token_term("kd", "top_k_kl", 1.0, tail=tail)
            got = head_loss(hidden_ND, weight_VD, labels_N, rows, [term], shared_vocab=64)
            known_N = (rows.ids_NK >= 64).sum(1) == 3  # type: ignore[operator]
            # The served row of a small K may not name all the teacher's own ids; their mass then stands in the tail.
            assert float(got.per_term["kd"][known_N].abs().sum()) < 1e-5
            assert bool(torch.isfinite(got.per_term["kd"]).all())
    full = TeacherRows(teacher_hidden_NE=teacher_NV, teacher_head=Head(torch.eye(67).double()))
    term = token_term("kd", "reverse_kl", 1.0, support="full")
    assert float(head_loss(hidden_ND, weight_VD, labels_N, full, [term], shared_vocab=64).total) < 1e-9


def test_rows_that_name_only_foreign_ids_still_give_cross_entropys_gradient() -> None:
    hidden_ND, weight_VD, labels_N, teacher_NV = case()
    labels_N[:5] = 0
    rows = dense.rows_of(teacher_NV, 4)
    rows = dataclasses.replace(rows, ids_NK=rows.ids_NK + 64)  # type: ignore[operator]
    within = token_term("in", "reverse_kl", 1.0, tail="renormalise")
    got = head_loss(hidden_ND, weight_VD, labels_N, rows, [CE, KD, within], shared_vocab=64)
    plain = head_loss(hidden_ND, weight_VD, labels_N, None, [CE])
    assert not bool(got.per_term["in"].any())
    torch.testing.assert_close(got.total, plain.total, rtol=1e-6, atol=1e-6)
    leaves = (hidden_ND, weight_VD)
    for ours, theirs in zip(
        torch.autograd.grad(got.total, leaves), torch.autograd.grad(plain.total, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_every_id_served_is_the_whole_divergence() -> None:
    hidden_ND, weight_VD, labels_N, teacher_NV = case()
    student_NV = dense.logits(hidden_ND, weight_VD)
    rows = dense.rows_of(teacher_NV, 64, (2.0,), torch.float16)
    for kind, temperature in (("forward_kl", 1.0), ("reverse_kl", 2.0)):
        got_N = head_loss(
            hidden_ND, weight_VD, labels_N, rows, [token_term("kd", kind, 1.0, temperature=temperature)]
        ).per_term["kd"]
        full = token_term("kd", kind, 1.0, temperature=temperature, support="full")
        want_N = dense.term_values(full, student_NV, labels_N, teacher_NV, None)
        torch.testing.assert_close(got_N, want_N.detach(), rtol=2e-3, atol=2e-3)


def test_scale_cap_and_bias_reach_value_and_gradient() -> None:
    hidden_ND, weight_VD, labels_N, teacher_NV = case()
    bias_V = torch.randn(64, dtype=torch.float64, requires_grad=True)
    rows = dense.rows_of(teacher_NV, 6, (2.0,))
    leaves = (hidden_ND, weight_VD, bias_V)
    # One pass writes its gradient over the logits, two may not; a soft cap needs the logits afterwards.
    for softcap, scale, terms in ((None, 0.25, [CE, KD]), (6.0, 1.0, [CE, KD]), (5.0, 1.7, [CE, KD, REVERSE])):
        got = head_loss(
            hidden_ND, weight_VD, labels_N, rows, terms, head_bias_V=bias_V, logit_softcap=softcap, logit_scale=scale
        )
        student_NV = dense.logits(*leaves, softcap, scale)
        want = torch.stack(
            [
                term.coefficient * dense.term_values(term, student_NV, labels_N, teacher_NV, rows.ids_NK.long()).sum()  # type: ignore[union-attr]
                for term in terms
            ]
        ).sum()
        torch.testing.assert_close(got.total, want)
        for ours, theirs in zip(torch.autograd.grad(got.total, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["top_k_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "tvd"])
def test_peaked_models_give_finite_values_and_gradients(kind: str) -> None:
    """One-hot teachers and students, agreeing and not, in float32 and with the wire's rounding."""
    student_NV = torch.zeros(4, 50)
    student_NV[[0, 1, 2, 3], [3, 3, 7, 9]] = torch.tensor([40.0, 120.0, 400.0, 0.0])
    teacher_NV = torch.zeros(4, 50)
    teacher_NV[[0, 1, 2, 3], [3, 8, 7, 9]] = torch.tensor([40.0, 120.0, 30.0, 200.0])
    student_NV.requires_grad_()
    for tail in ("bucket", "renormalise"):
        rows = dense.rows_of(teacher_NV, 5, (), torch.float16)
        term = token_term("kd", kind, 1.0, tail=tail)
        result = head_loss(student_NV, torch.eye(50), torch.zeros(4, dtype=torch.long), rows, [term])
        (gradient_NV,) = torch.autograd.grad(result.total, student_NV)
        assert bool(torch.isfinite(result.per_term["kd"]).all()) and bool(torch.isfinite(gradient_NV).all())
        assert float(result.per_term["kd"][0].abs()) < 1e-4


def test_a_small_tail_keeps_its_digits_in_float32() -> None:
    """The student's tail of about 1e-7 is summed over the tail itself; one minus the rest would be off by its size."""
    vocab, k = 200, 4
    student_NV = torch.randn(8, vocab)
    student_NV[:, :k] += 21.0
    teacher_NV = torch.randn(8, vocab)
    teacher_NV[:, :k] += 12.0
    rows = dense.rows_of(teacher_NV, k)
    leaf_NV = student_NV.clone().requires_grad_()
    got = head_loss(leaf_NV, torch.eye(vocab), torch.zeros(8, dtype=torch.long), rows, [KD])
    exact_NV = student_NV.double().requires_grad_()
    assert rows.ids_NK is not None
    want_N = dense.term_values(KD, exact_NV, torch.zeros(8, dtype=torch.long), teacher_NV.double(), rows.ids_NK.long())
    torch.testing.assert_close(got.per_term["kd"].double(), want_N.detach(), rtol=1e-3, atol=1e-5)
    (ours_NV,) = torch.autograd.grad(got.total, leaf_NV)
    (theirs_NV,) = torch.autograd.grad(want_N.sum(), exact_NV)
    torch.testing.assert_close(ours_NV[:, k:].double(), theirs_NV[:, k:], rtol=2e-2, atol=1e-8)


def test_two_likely_tokens_and_a_vanishing_tail_give_zero_despite_the_rounding() -> None:
    """Rounded to fp16 the two logprobs miss up to 2.4e-4 of mass; taken for a tail of 1e-9 it would cost 3e-3 nats."""
    share = torch.linspace(0.3, 0.7, 41, dtype=torch.float64)
    teacher_NV = torch.full((41, 100), -25.0, dtype=torch.float64)
    teacher_NV[:, 3], teacher_NV[:, 8] = share.log(), (1 - share).log()
    rows = dense.rows_of(teacher_NV, 16, (), torch.float16)
    for kind in ("top_k_kl", "reverse_kl", "jsd"):
        got = head_loss(
            teacher_NV, torch.eye(100).double(), torch.zeros(41, dtype=torch.long), rows, [token_term("kd", kind, 1.0)]
        )
        assert float(got.per_term["kd"].abs().max()) < 1e-6


def test_a_uniform_teacher_keeps_its_whole_tail() -> None:
    """Where every id is as likely as the least of the K, the bound on the tail is the tail itself."""
    teacher_NV = torch.zeros(3, 50_000, dtype=torch.float64)
    student_NV = torch.zeros(3, 50_000, dtype=torch.float64)
    student_NV[:, :64] = 4.0
    rows = dense.rows_of(teacher_NV, 64, (), torch.float16)
    rows = dataclasses.replace(rows, ids_NK=torch.arange(64).repeat(3, 1))
    p_tail = 1 - 64 / 50_000
    q_tail = (50_000 - 64) / (50_000 - 64 + 64 * torch.tensor(4.0).exp().item())
    want = p_tail * torch.tensor(p_tail / q_tail).log() + (1 - p_tail) * torch.tensor((1 - p_tail) / (1 - q_tail)).log()
    counted_N = torch.ones(3, dtype=torch.bool)
    log_p_NB = with_tail(read_support(rows, "top_k", 1.0, 50_000, counted_N), 50_000)
    log_q_NB = torch.full((65,), (1 - q_tail) / 64).log()
    log_q_NB[-1] = torch.tensor(q_tail).log()
    got_N = (log_p_NB.exp() * (log_p_NB - log_q_NB)).sum(-1)
    torch.testing.assert_close(got_N, want.expand(3).to(got_N.dtype), rtol=2e-3, atol=1e-5)


def test_a_tail_below_float32s_range_still_has_its_gradient() -> None:
    """A student whose tail has underflowed is pulled back: softmax within the tail times (q_tail - p_tail)."""
    student_NV = torch.randn(4, 30)
    student_NV[:, 5] = 300.0
    teacher_NV = torch.randn(4, 30)
    leaf_NV = student_NV.clone().requires_grad_()
    rows = dense.rows_of(teacher_NV, 3)
    rows = dataclasses.replace(rows, ids_NK=torch.tensor([[5, 6, 7]] * 4))
    got = head_loss(leaf_NV, torch.eye(30), torch.zeros(4, dtype=torch.long), rows, [KD])
    (gradient_NV,) = torch.autograd.grad(got.total, leaf_NV)
    assert rows.logprobs_NK is not None
    p_tail_N = 1 - rows.logprobs_NK.exp().sum(-1)
    tail = [i for i in range(30) if i not in (5, 6, 7)]
    want_NV = -p_tail_N[:, None] * student_NV[:, tail].softmax(-1)
    torch.testing.assert_close(gradient_NV[:, tail], want_NV, rtol=1e-4, atol=1e-7)


def test_a_tail_that_rounding_has_swallowed_does_not_make_reverse_kl_infinite() -> None:
    """On the student's own support nothing bounds the tail; the floor stands in for one that fp16 rounded to none."""
    share = torch.linspace(0.3, 0.7, 401, dtype=torch.float64)
    teacher_NV = torch.full((401, 100), -18.0, dtype=torch.float64)
    teacher_NV[:, 0], teacher_NV[:, 1] = share.log(), (1 - share).log()
    logprobs_NG = teacher_NV.log_softmax(-1)[:, :2].half()
    swallowed_N = logprobs_NG.double().exp().sum(-1) >= 1
    assert bool(swallowed_N.any())
    student_NV = teacher_NV.clone()
    student_NV[:, 2:] = -11.5  # a tail of 1e-3
    rows = TeacherRows(gather_ids_NG=torch.tensor([[0, 1]] * 401), gather_logprobs_NG=logprobs_NG)
    term = token_term("kd", "reverse_kl", 1.0, support="gather")
    got = head_loss(student_NV, torch.eye(100).double(), torch.zeros(401, dtype=torch.long), rows, [term])
    ids_NG = torch.tensor([[0, 1]] * 401)
    p_NB, q_NB = (dense.bucketed(z_NV.softmax(-1), ids_NG, "bucket") for z_NV in (teacher_NV, student_NV))
    exact_N = dense.divergence(term, p_NB, q_NB)
    torch.testing.assert_close(got.per_term["kd"][swallowed_N], exact_N[swallowed_N], rtol=0, atol=0.012)


def test_a_label_that_only_the_student_has_is_learnt_beside_distillation() -> None:
    """A softmax over the shared ids has no logit of such a label, and no use of one."""
    hidden_ND, weight_VD = torch.randn(6, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    labels_N = torch.tensor([39, 32, 3, 38, 5, 31])
    teacher = dense.rows_of(torch.randn(6, 32, dtype=torch.float64), 5)
    terms = [token_term("ce", "cross_entropy", 1.0), token_term("kd", "top_k_kl", 1.0)]
    loss = head_loss(hidden_ND, weight_VD, labels_N, teacher, terms, shared_vocab=32)
    expected_N = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.T, labels_N, reduction="none")
    torch.testing.assert_close(loss.per_term["ce"], expected_N)
