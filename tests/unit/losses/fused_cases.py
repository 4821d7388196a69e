"""The kernels of `losses.fused` against the reference, at small shapes, run by Triton's interpreter.

No file that pytest finds by itself: `test_fused.py` runs it in a process where `TRITON_INTERPRET` is set. A row takes
several blocks, the last one not full, and a call several chunks; kernels compute in float64 where the inputs are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from student_trainer.losses import Head, HeadLoss, TeacherRows, TokenTerm, chunks, head_loss, token_term
from student_trainer.losses.divergences import DIVERGENCES, LABEL_LOSSES
from student_trainer.losses.fused import divergences, launch
from student_trainer.losses.passes import HOLE
from student_trainer.losses.supports import LOG_FLOOR
from tests.unit.losses import dense

ROWS, VOCAB, WIDTH, K, CHUNK = 9, 75, 6, 5, 4
TEMPERATURES = (1.0, 2.0, 5.0)
KINDS = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "tvd")


@pytest.fixture(autouse=True)
def several_blocks(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row of the vocabulary."""
    monkeypatch.setattr(launch, "BLOCK", 64)


def inputs(dtype: torch.dtype = torch.float64, spread: float = 2.0) -> dict[str, Any]:
    """Leaves, labels of which two are ignored, and a teacher that says all that any support reads."""
    teacher_NV = torch.randn(ROWS, VOCAB, dtype=dtype) * spread
    rows = dense.rows_of(teacher_NV, K, TEMPERATURES[1:])
    chosen_NG = torch.rand(ROWS, VOCAB).topk(K + 2).indices
    # Of the other support's ids some, and the label on some rows.
    chosen_NG[: ROWS // 2, 0] = rows.ids_NK[: ROWS // 2, 1].long()  # type: ignore[index]
    chosen_NG[: ROWS // 2, 1:] = (chosen_NG[: ROWS // 2, :1] + torch.arange(1, K + 2)) % VOCAB
    labels_N = torch.randint(VOCAB, (ROWS,))
    labels_N[0], labels_N[1], labels_N[2] = rows.ids_NK[0, 1], chosen_NG[1, 3], rows.ids_NK[2, 0]  # type: ignore[index]
    labels_N[5] = labels_N[7] = -100
    lengths_N = torch.randint(0, 4, (ROWS,))
    lengths_N[3] = 0
    ids = torch.cat([torch.rand(VOCAB).topk(int(n)).indices for n in lengths_N])
    return {
        "leaves": [torch.randn(*shape, dtype=dtype) for shape in ((ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,))],
        "labels": labels_N,
        "teacher": replace(
            rows, gather_ids_NG=chosen_NG,
            gather_logprobs_NG=teacher_NV.log_softmax(-1).gather(1, chosen_NG),
            sampled_offsets=torch.cat([torch.zeros(1, dtype=torch.long), lengths_N.cumsum(0)]), sampled_ids=ids,
            sampled_counts=torch.randint(1, 5, ids.shape), teacher_hidden_NE=torch.randn(ROWS, 4, dtype=dtype) * 2,
            teacher_head=Head(torch.randn(VOCAB, 4, dtype=dtype), torch.randn(VOCAB, dtype=dtype), 7.0, 1.3),
        ),
    }  # fmt: skip


def in_float64(teacher: TeacherRows) -> TeacherRows:
    """The same numbers, to be computed with more exactly."""
    head = teacher.teacher_head
    if head is not None:
        assert head.bias_V is not None and teacher.teacher_hidden_NE is not None
        head = replace(head, weight_VD=head.weight_VD.double(), bias_V=head.bias_V.double())
        teacher = replace(teacher, teacher_head=head, teacher_hidden_NE=teacher.teacher_hidden_NE.double())
    return teacher


def both(
    x: dict[str, Any], terms: list[TokenTerm], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[tuple[HeadLoss, list[Tensor]]]:
    """Loss and gradients by the kernels, then by the reference in float64."""
    found = []
    for kernels in (True, False):
        monkeypatch.setattr(chunks, "kernels_serve", lambda device, kernels=kernels: kernels)
        leaves = [(leaf if kernels else leaf.double()).detach().requires_grad_() for leaf in x["leaves"]]
        teacher = x["teacher"] if kernels else in_float64(x["teacher"])
        hidden_ND, weight_VD, bias_V = leaves
        loss = head_loss(
            hidden_ND, weight_VD, x["labels"], teacher, terms, head_bias_V=bias_V, chunk_rows=CHUNK, **options
        )
        found.append((loss, list(torch.autograd.grad(loss.total, leaves))))
    return found


def hold(
    x: dict[str, Any], terms: list[TokenTerm], monkeypatch: pytest.MonkeyPatch, rtol: float = 1e-9, **options: Any
) -> None:
    (ours, our_gradients), (theirs, their_gradients) = both(x, terms, monkeypatch, **options)
    for term in terms:
        want_N = theirs.per_term[term.name]
        torch.testing.assert_close(ours.per_term[term.name].double(), want_N, rtol=rtol, atol=rtol)
        assert want_N.any()
    for got, want in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=rtol * float(want.abs().max()))
    if options.get("want_top1"):
        assert ours.top1_N is not None and theirs.top1_N is not None
        assert torch.equal(ours.top1_N, theirs.top1_N)


def all_kinds(support: str, temperature: float, squared: bool = True) -> list[TokenTerm]:
    """Every kind on a support, with what lies outside in a bucket and left out, and cross-entropy."""
    terms = [token_term("ce", "cross_entropy", 0.7)]
    if support == "sampled":
        return [*terms, token_term("s", "sampled", 1.3, temperature=temperature)]
    if support == "top_k":
        terms.append(token_term("tcs", "tcs", 0.4, temperature=temperature))
        terms.append(token_term("cut", "tcs", 0.9, temperature=temperature, tail="truncate"))
    tails = ("bucket",) if support == "full" else ("bucket", "renormalise")
    return terms + [
        dense.term_of(
            kind, 0.5 + 0.3 * number, f"{kind}-{tail}", temperature=temperature, tail=tail, beta=0.3, alpha=0.2,
            temperature_squared=squared and number % 2 == 0, support=support,
        )
        for number, kind in enumerate(KINDS)
        for tail in tails
    ]  # fmt: skip


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("support", ["top_k", "gather", "full", "sampled"])
def test_every_kind_on_every_support(support: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    x["teacher"] = replace(x["teacher"], sampled_temperature=temperature)
    # What is drawn is counted in float32.
    rtol = 1e-6 if support == "sampled" else 1e-9
    hold(x, all_kinds(support, temperature), monkeypatch, rtol, want_top1=True)


def test_rows_that_weigh_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights reach the gradient and the total, not the values."""
    terms = [*all_kinds("top_k", 2.0), token_term("whole", "jsd", 0.8, support="full")]
    hold(inputs(), terms, monkeypatch, weights_N=torch.rand(ROWS) * 3)


@pytest.mark.parametrize(
    "options", [{"logit_softcap": 3.0}, {"logit_scale": 0.3}, {"logit_softcap": 5.0, "logit_scale": 2.5}]
)
def test_softcap_and_scale_of_several_softmaxes(options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    terms = [
        token_term("ce", "cross_entropy", 0.7),
        token_term("kd", "top_k_kl", 1.0),
        token_term("soft", "jsd", 2.0, temperature=2.0),
        token_term("softer", "reverse_kl", 1.5, temperature=5.0, tail="renormalise"),
        token_term("whole", "skewed_kl", 0.8, temperature=2.0, support="full"),
    ]  # fmt: skip
    hold(inputs(), terms, monkeypatch, want_top1=True, **options)


@pytest.mark.parametrize("order", [("top_k", "gather", "sampled"), ("sampled", "gather", "top_k"), ("gather", "top_k")])
def test_several_supports_that_share_ids(order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """An id may be in each of them, be the label as well, or in none."""
    kinds = {"top_k": "forward_kl", "gather": "reverse_kl", "sampled": "sampled"}
    terms = [dense.term_of(kinds[name], 1.0 + n, name, support=name) for n, name in enumerate(order)]
    if order[0] != "sampled":
        terms.append(token_term("ce", "cross_entropy", 0.7))
        terms.append(token_term("warm", "jsd", 0.4, temperature=2.0, support=order[0]))
    terms.append(token_term("whole", "jsd", 0.6, support="full"))
    hold(inputs(), terms, monkeypatch, 1e-6 if "sampled" in order else 1e-9)


@pytest.mark.parametrize("shared", [74, 64, 33])
def test_ids_that_only_the_student_has(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distillation is over the shared ids; cross-entropy over all of them, with a softmax of its own."""
    terms = [
        token_term("ce", "cross_entropy", 0.7),
        token_term("kd", "top_k_kl", 1.0),
        token_term("own", "jsd", 1.0, temperature=2.0, support="gather"),
        token_term("whole", "tvd", 0.8, temperature=2.0, support="full"),
    ]  # fmt: skip
    x = inputs()
    # An id beyond the shared ones that towers above all: the shared softmax must not be measured against it.
    x["leaves"][2][-1] = 300.0
    hold(x, terms, monkeypatch, shared_vocab=shared, want_top1=True)


def test_rows_that_count_for_some_terms_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    valid_N = torch.ones(ROWS, dtype=torch.bool)
    valid_N[[0, 5]] = False
    broken_NK = x["teacher"].logprobs_NK.clone()
    broken_NK[[0, 5]] = torch.nan
    x["teacher"] = replace(x["teacher"], valid_N=valid_N, logprobs_NK=broken_NK)
    hold(x, [token_term("ce", "cross_entropy", 0.7),
             token_term("kd", "top_k_kl", 1.0),
             token_term("whole", "jsd", 1.0, support="full")],
         monkeypatch, want_top1=True)  # fmt: skip


def test_cross_entropy_alone_and_no_gradient_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    hold(x, [token_term("ce", "cross_entropy", 0.7)], monkeypatch, want_top1=True)
    monkeypatch.setattr(chunks, "kernels_serve", lambda device: True)
    loss = head_loss(*x["leaves"][:2], x["labels"], x["teacher"], [token_term("kd", "top_k_kl", 1.0)], chunk_rows=CHUNK)
    assert not loss.total.requires_grad and float(loss.total) > 0


def test_a_support_that_names_every_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is outside it; the tail has the least mass that a tail may have."""
    x = inputs()
    teacher_NV = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    x["teacher"] = dense.rows_of(teacher_NV, VOCAB, (2.0,))
    given = token_term("r", "reverse_kl", 1.0, temperature=2.0, tail="renormalise")
    hold(x, [token_term("ce", "cross_entropy", 0.7), token_term("kd", "top_k_kl", 1.0), given], monkeypatch)


def test_an_id_that_only_a_softer_softmax_has_in_its_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """At T = 1 the teacher's logprob is below what counts; at T = 5 it isn't."""
    x = inputs()
    teacher_NV = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    teacher_NV[:, :K] -= 120.0
    teacher_NV[:, K:] -= 1000.0
    teacher_NV[:, 0] = 0.0
    x["teacher"] = dense.rows_of(teacher_NV, K, (5.0,))
    assert ((x["teacher"].logprobs_NK < LOG_FLOOR).sum(-1) == K - 1).all()
    hold(
        x,
        [
            token_term("kd", "top_k_kl", 1.0),
            token_term("soft", "jsd", 1.0, temperature=5.0),
            token_term("ce", "cross_entropy", 0.7),
        ],
        monkeypatch,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_float32_is_as_exact_as_float32_can_be(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peaked student and teacher, so that the tail is small and its digits count."""
    x = inputs(torch.float32, spread=6.0)
    whole = token_term("whole", "jsd", 1.0, temperature=temperature, support="full")
    hold(x, [*all_kinds("top_k", temperature, squared=False), whole], monkeypatch, rtol=2e-5)


def test_bf16_hidden_states_and_head_get_a_gradient_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are float32; the gradient by them is rounded once, to bf16, in memory of its own."""
    x = inputs(torch.float32)
    x["leaves"] = [leaf.bfloat16().float() for leaf in x["leaves"]]
    want = both(x, all_kinds("top_k", 2.0), monkeypatch)[1]
    x["leaves"] = [leaf.bfloat16() for leaf in x["leaves"]]
    monkeypatch.setattr(chunks, "kernels_serve", lambda device: True)
    leaves = [leaf.requires_grad_() for leaf in x["leaves"]]
    loss = head_loss(
        leaves[0],
        leaves[1],
        x["labels"],
        x["teacher"],
        all_kinds("top_k", 2.0),
        head_bias_V=leaves[2],
        chunk_rows=CHUNK,
    )
    for name, values_N in loss.per_term.items():
        torch.testing.assert_close(values_N.double(), want[0].per_term[name], rtol=2e-5, atol=2e-5)
    for got, exact in zip(torch.autograd.grad(loss.total, leaves), want[1], strict=True):
        # Each number is rounded by 2^-9 of itself, three times at most; one whose parts cancel is off by theirs.
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=2**-5 * float(exact.abs().max()))
        assert float((got.double() - exact).norm() / exact.norm()) < 2**-7


def test_kernels_know_the_kinds_and_constants_of_the_reference() -> None:
    from student_trainer.losses.fused import normalise

    assert set(divergences.KINDS) == {*KINDS, "top_k_kl", "tcs", "sampled"} <= set(DIVERGENCES)
    assert set(divergences.LABEL_KINDS) == {"cross_entropy"} <= set(LABEL_LOSSES)
    assert normalise.HOLE.value == HOLE and normalise.LOG_FLOOR.value == LOG_FLOOR


@pytest.mark.parametrize(("unknown", "names"), [("tvd", "KINDS"), ("cross_entropy", "LABEL_KINDS")])
def test_a_call_with_a_kind_that_has_no_kernel_goes_by_the_reference(
    unknown: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernels(*_: Any) -> None:
        raise AssertionError("the kernels were asked")

    known = getattr(divergences, names)
    monkeypatch.setattr(divergences, names, {kind: number for number, kind in enumerate(known) if kind != unknown})
    monkeypatch.setattr(launch, "FusedTerms", no_kernels)
    x = inputs()
    (_, theirs), (_, ours) = both(x, [token_term("x", unknown), token_term("kl", "top_k_kl")], monkeypatch)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(AssertionError, match="were asked"):
        both(x, [token_term("jsd", "jsd")], monkeypatch)
