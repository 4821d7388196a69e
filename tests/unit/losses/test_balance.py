"""Shares of the gradient: what is measured, what is made of it, and what a checkpoint keeps."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from student_trainer.losses import TeacherRows, head_loss, token_term
from student_trainer.losses.balance import GradientBalance, gradient_norms, term_gradient_norms
from student_trainer.losses.weighting import Weighting, gradient_shares, weight_at

TERMS = (
    token_term("cross_entropy", "cross_entropy", coefficient=0.3),
    token_term("soft", "forward_kl", coefficient=7.0, temperature=2.0, temperature_squared=True),
    token_term("back", "reverse_kl", coefficient=0.01),
)


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, TeacherRows]:
    """Hidden rows, head, labels with gaps, and a teacher's top 8 of 40."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(20, 12, generator=generator)
    weight_VD = torch.randn(40, 12, generator=generator)
    labels_N = torch.randint(40, (20,), generator=generator)
    labels_N[3] = -100
    teacher_NV = torch.log_softmax(2 * torch.randn(20, 40, generator=generator), -1)
    top = teacher_NV.topk(8)
    log_z_N = torch.logsumexp(teacher_NV / 2, -1)
    teacher = TeacherRows(top.indices, top.values, log_z_NT=log_z_N[:, None], temperatures=(2.0,))
    return hidden_ND, weight_VD, labels_N, teacher


def test_the_norm_of_a_term_is_that_of_its_gradient_at_the_hidden_states() -> None:
    hidden_ND, weight_VD, labels_N, teacher = rows()
    loss = lambda hidden, terms: head_loss(hidden, weight_VD, labels_N, teacher, terms)  # noqa: E731
    with torch.no_grad():
        norms = term_gradient_norms(loss, hidden_ND, TERMS)
    assert list(norms) == ["cross_entropy", "soft", "back"]
    leaf_ND = hidden_ND.double().requires_grad_()
    log_q_NV = torch.log_softmax(leaf_ND @ weight_VD.double().T, -1)
    nn.functional.nll_loss(log_q_NV, labels_N, ignore_index=-100, reduction="sum").backward()
    assert norms["cross_entropy"] == pytest.approx(leaf_ND.grad.norm().item(), rel=1e-5)
    # The coefficient in the settings plays no part, and the rows' own graph is not touched.
    assert not hidden_ND.requires_grad
    for term in TERMS:
        leaf_ND = hidden_ND.clone().requires_grad_()
        loss(leaf_ND, (term,)).total.backward()
        assert norms[term.name] * term.coefficient == pytest.approx(leaf_ND.grad.norm().item(), rel=1e-5)


def test_balanced_terms_pull_with_the_shares_that_were_set() -> None:
    hidden_ND, weight_VD, labels_N, teacher = rows()
    loss = lambda hidden, terms: head_loss(hidden, weight_VD, labels_N, teacher, terms)  # noqa: E731
    balance = GradientBalance({"cross_entropy": 0.2, "soft": 0.5, "back": 0.3}, "cross_entropy")
    balance = balance.update(term_gradient_norms(loss, hidden_ND, TERMS))
    coefficients = balance.coefficients()
    assert coefficients["cross_entropy"] == 1.0
    pulls = {}
    for term in TERMS:
        leaf_ND = hidden_ND.clone().requires_grad_()
        (loss(leaf_ND, (term,)).total / term.coefficient * coefficients[term.name]).backward()
        pulls[term.name] = leaf_ND.grad.norm().item()
    total = sum(pulls.values())
    assert {name: pull / total for name, pull in pulls.items()} == pytest.approx(dict(balance.shares), rel=1e-5)


def test_norms_over_parameters_are_those_of_separate_backward_passes() -> None:
    torch.manual_seed(0)
    body, probe = nn.Linear(6, 12), nn.Linear(6, 6)
    _, weight_VD, labels_N, _ = rows()
    input_ = torch.randn(20, 6)
    hidden_ND = body(input_)
    leaf_ND = hidden_ND.detach().requires_grad_()
    head_loss(leaf_ND, weight_VD, labels_N, None, TERMS[:1]).total.backward()
    roots = {"cross_entropy": (hidden_ND, leaf_ND.grad), "relation": (body(input_).square().sum(), None),
             "elsewhere": (probe(input_).sum(), None)}  # fmt: skip
    norms = gradient_norms(roots, list(body.parameters()))
    assert norms["elsewhere"] == 0.0
    for name in ("cross_entropy", "relation"):
        body.zero_grad()
        root, gradient = roots[name]
        root.backward(gradient, retain_graph=True)
        expected = math.sqrt(sum(p.grad.square().sum().item() for p in body.parameters()))
        assert norms[name] == pytest.approx(expected, rel=1e-5)


def test_means_forget_at_the_rate_of_ema_and_have_no_bias_at_the_start() -> None:
    start = GradientBalance({"a": 1.0, "b": 2.0}, "a", ema=0.75)
    assert start.coefficients() == {"a": 1.0, "b": 2.0}
    once = start.update({"a": 3.0, "b": 0.5})
    assert once.coefficients() == pytest.approx({"a": 1.0, "b": 2 * 3.0 / 0.5})
    twice = once.update({"a": 1.0, "b": 2.0})
    mean_a, mean_b = (0.75 * 3 + 1) / 1.75, (0.75 * 0.5 + 2) / 1.75
    assert twice.coefficients() == pytest.approx({"a": 1.0, "b": 2 * mean_a / mean_b})
    steady = twice
    for _ in range(60):
        steady = steady.update({"a": 4.0, "b": 8.0})
    assert steady.coefficients() == pytest.approx({"a": 1.0, "b": 1.0})
    assert start.coefficients() == {"a": 1.0, "b": 2.0}  # updates are of new records


def test_a_gradient_that_vanished_neither_overflows_nor_moves_the_mean() -> None:
    balance = GradientBalance({"a": 1.0, "b": 1.0}, "a", ema=0.5).update({"a": 2.0, "b": 4.0})
    assert balance.update({"a": 2.0, "b": 0.0}).coefficients() == pytest.approx({"a": 1.0, "b": 0.5})
    tiny = GradientBalance({"a": 1.0, "b": 1.0}, "a").update({"a": 1.0, "b": 1e-30})
    assert tiny.coefficients()["b"] == 1e6
    unseen = GradientBalance({"a": 1.0, "b": 3.0}, "a").update({"a": 0.0, "b": 5.0})
    assert unseen.coefficients() == {"a": 1.0, "b": 3.0}


def test_state_goes_through_json_exactly() -> None:
    balance = GradientBalance({"a": 1.0, "b": 2.0}, "a", ema=0.9)
    for number in range(5):
        balance = balance.update({"a": 1.0 / (number + 3), "b": math.pi * number})
    fresh = GradientBalance({"a": 1.0, "b": 2.0}, "a", ema=0.9)
    restored = fresh.restored(json.loads(json.dumps(balance.state())))
    assert restored == balance and restored.coefficients() == balance.coefficients()
    fewer = GradientBalance({"a": 1.0}, "a").restored(balance.state())
    assert fewer.coefficients() == {"a": 1.0} and "b" not in fewer.state()["means"]


def test_it_is_due_at_the_first_step_and_every_few() -> None:
    balance = GradientBalance({"a": 1.0}, "a", every=20)
    assert balance.due(7), "nothing was measured yet"
    balance = balance.update({"a": 1.0})
    assert [step for step in range(61) if balance.due(step)] == [0, 20, 40, 60]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(GradientBalance, {"a": 1.0}, "b"), "got reference 'b'"),
        (partial(GradientBalance, {"a": 1.0, "b": 0.0}, "a"), "got share 0.0 of 'b'"),
        (partial(GradientBalance, {"a": math.inf}, "a"), "got share inf"),
        (partial(GradientBalance, {"a": 1.0}, "a", ema=1.0), "got ema 1.0"),
        (partial(GradientBalance, {"a": 1.0}, "a", every=0), "got every 0"),
        (partial(GradientBalance({"a": 1.0}, "a").update, {"b": 1.0}), "got norms of"),
        (partial(GradientBalance({"a": 1.0}, "a").update, {"a": math.nan}), "has norm nan"),
        (partial(weight_at, (), 3), "got \\[\\]"),
        (partial(weight_at, ((4, 1.0), (4, 2.0)), 3), "ascending order of steps"),
    ],
)
def test_what_cannot_be_is_refused(make: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_by_step_follow_straight_lines_between_their_points() -> None:
    points = ((10, 0.0), (20, 1.0), (40, 0.5))
    assert [weight_at(points, step) for step in (0, 10, 15, 20, 30, 40, 1000)] == [0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    assert [weight_at(((5, 2.0),), step) for step in (0, 5, 9)] == [2.0, 2.0, 2.0]


def test_a_weighting_gives_each_step_its_coefficients() -> None:
    weighting = Weighting(TERMS, {"soft": ((0, 0.0), (10, 1.0))})
    assert [term.coefficient for term in weighting.at(5)] == [0.3, 3.5, 0.01]
    assert weighting.at(5)[1] == replace(TERMS[1], coefficient=3.5)
    assert not Weighting(TERMS).varies and Weighting(TERMS).at(7) == TERMS
    assert Weighting(TERMS).state() is None and not Weighting(TERMS).due(0)


def test_a_balanced_term_pulls_as_hard_as_its_share_whatever_its_coefficient() -> None:
    hidden_ND, weight_VD, labels_N, teacher = rows(3)
    loss = lambda hidden, terms: head_loss(hidden, weight_VD, labels_N, teacher, terms)  # noqa: E731
    balance = GradientBalance({"cross_entropy": 1.0, "soft": 3.0}, "cross_entropy", every=10)
    weighting = Weighting(TERMS, {"back": ((0, 2.0),)}, balance)
    assert weighting.due(3) and [term.name for term in weighting.measured_terms] == ["cross_entropy", "soft"]
    norms = term_gradient_norms(loss, hidden_ND, weighting.measured_terms)
    weighting = weighting.take_in(norms)
    assert weighting.due(10) and not weighting.due(3)
    terms = weighting.at(3)
    assert terms[0].coefficient == 0.3 and terms[2].coefficient == 0.02
    shares = gradient_shares(terms, norms)
    assert shares == pytest.approx({"cross_entropy": 0.25, "soft": 0.75})
    assert Weighting(TERMS, {}, balance).restored(json.loads(json.dumps(weighting.state()))).at(3)[1] == terms[1]
    assert gradient_shares(terms, dict.fromkeys(norms, 0.0)) == {}
