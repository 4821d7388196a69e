"""What `head_loss` promises around its numbers: dtypes, memory, evaluation, one backward pass, and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from student_trainer.losses import Head, HeadLoss, TeacherRows, head_loss, token_term
from student_trainer.losses.kinds import TERMS, term_of
from student_trainer.losses.supports import SUPPORTS
from student_trainer.losses.terms import Needs
from student_trainer.settings import TeacherSettings
from student_trainer.settings.attention import AttentionSettings
from student_trainer.settings.terms import KINDS, TermSettings
from student_trainer.targets.attention import AttentionSource
from student_trainer.targets.student_support import student_top_ids
from teacher_proto.requests import KINDS as REQUEST_KINDS
from tests.unit.losses import dense

CE = token_term("ce", "cross_entropy", 0.5)
KD = token_term("kd", "top_k_kl", 1.0, temperature=2.0)


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest storage that any operation inside returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def case(n: int = 48, vocab: int = 96, width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TeacherRows]:
    hidden_ND = torch.randn(n, width, requires_grad=True)
    weight_VD = torch.randn(vocab, width, requires_grad=True)
    rows = dense.rows_of(torch.randn(n, vocab) * 3, 8, (2.0,), torch.float16)
    return hidden_ND, weight_VD, torch.randint(vocab, (n,)), rows


def run(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, rows: TeacherRows) -> HeadLoss:
    return head_loss(hidden_ND, weight_VD, labels_N, rows, [CE, KD])


def test_no_array_of_rows_by_vocabulary_outlives_a_chunk() -> None:
    """Nothing larger than a chunk of logits is ever allocated; the naive form, watched alike, allocates it all."""
    n, vocab, chunk = 512, 4096, 32
    hidden_ND, weight_VD, labels_N, rows = case(n, vocab)
    full = TeacherRows(teacher_hidden_NE=torch.randn(n, 8), teacher_head=Head(torch.randn(vocab, 8)))
    whole = token_term("full", "jsd", 1.0, support="full")
    for targets, terms in ((rows, [CE, KD, token_term("r", "reverse_kl", 1.0)]), (full, [CE, whole])):
        with LargestStorage() as watched:
            head_loss(hidden_ND, weight_VD, labels_N, targets, terms, chunk_rows=chunk).total.backward()
        assert watched.largest <= max(chunk * vocab, vocab * 16) * 4
    with LargestStorage() as watched:
        torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.T, labels_N).backward()
    assert watched.largest == n * vocab * 4


def test_default_chunks_stay_near_their_bound_at_a_large_vocabulary() -> None:
    hidden_ND, weight_VD, labels_N, rows = case(2048, 40_000, 4)
    with LargestStorage() as watched:
        run(hidden_ND, weight_VD, labels_N, rows)
    assert watched.largest <= 70e6 < 2048 * 40_000 * 4


def test_bf16_models_get_float32_logits() -> None:
    """bf16 in, bf16 gradients out; values as exact as float32 arithmetic on the rounded inputs. The backward products
    run in bf16, so a sum whose parts cancel is off by the rounding of its parts.
    """
    hidden_ND, weight_VD, labels_N, rows = case()
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden_ND, weight_VD)]
    wide = [x.detach().float().requires_grad_() for x in low]
    got, want = run(*low, labels_N, rows), run(*wide, labels_N, rows)
    assert got.total.dtype == torch.float32 and got.per_term["kd"].dtype == torch.float32
    for name in ("ce", "kd"):
        torch.testing.assert_close(got.per_term[name], want.per_term[name], rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(got.total, low), torch.autograd.grad(want.total, wide), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=2**-8 * float(theirs.abs().max()))
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 2**-7


def test_autocast_does_not_reach_inside() -> None:
    hidden_ND, weight_VD, labels_N, rows = case()
    plain = run(hidden_ND, weight_VD, labels_N, rows)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(hidden_ND, weight_VD, labels_N, rows)
    assert torch.equal(plain.per_term["kd"], inside.per_term["kd"]) and torch.equal(plain.total, inside.total)


def test_evaluation_gives_the_same_values_and_no_gradient() -> None:
    hidden_ND, weight_VD, labels_N, rows = case()
    training = run(hidden_ND, weight_VD, labels_N, rows)
    with torch.no_grad():
        evaluation = head_loss(hidden_ND, weight_VD, labels_N, rows, [CE, KD], want_top1=True)
    assert training.total.requires_grad and not evaluation.total.requires_grad
    for name in ("ce", "kd"):
        assert torch.equal(training.per_term[name], evaluation.per_term[name])
        assert not training.per_term[name].requires_grad
    assert training.top1_N is None and evaluation.top1_N is not None
    assert torch.equal(evaluation.top1_N, (hidden_ND @ weight_VD.T).argmax(-1))


def test_only_the_gradients_that_are_needed_are_made() -> None:
    hidden_ND, weight_VD, labels_N, rows = case()
    both = torch.autograd.grad(run(hidden_ND, weight_VD, labels_N, rows).total, (hidden_ND, weight_VD))
    (only_hidden,) = torch.autograd.grad(run(hidden_ND, weight_VD.detach(), labels_N, rows).total, hidden_ND)
    (only_weight,) = torch.autograd.grad(run(hidden_ND.detach(), weight_VD, labels_N, rows).total, weight_VD)
    assert torch.equal(only_hidden, both[0]) and torch.equal(only_weight, both[1])


def test_gradients_flow_on_through_a_tied_embedding() -> None:
    """The head is the embedding: both paths add up, as in the dense form."""
    _, weight_VD, labels_N, rows = case()
    tokens_N = torch.randint(96, (48,))
    run(weight_VD[tokens_N].tanh(), weight_VD, labels_N, rows).total.backward()
    ours, weight_VD.grad = weight_VD.grad, None
    hidden_ND = weight_VD[tokens_N].tanh()
    student_NV = hidden_ND @ weight_VD.T
    assert ours is not None and rows.ids_NK is not None and rows.logprobs_NK is not None and rows.log_z_NT is not None
    # The rounded logprobs are the target; rebuild the K + 1 buckets from them.
    p_NK = (rows.logprobs_NK.float() / 2 - rows.log_z_NT).exp()
    p_NB = torch.cat([p_NK, 1 - p_NK.sum(1, keepdim=True)], 1)
    q_NB = dense.bucketed((student_NV / 2).softmax(-1), rows.ids_NK.long(), "bucket")
    kd = dense.divergence(KD, p_NB, q_NB).sum()
    (kd + 0.5 * torch.nn.functional.cross_entropy(student_NV, labels_N, reduction="sum")).backward()
    torch.testing.assert_close(ours, weight_VD.grad, rtol=1e-4, atol=1e-4)


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    hidden_ND, weight_VD, labels_N, rows = case()
    total = run(hidden_ND, weight_VD, labels_N, rows).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call head_loss again"):
        total.backward()


def test_two_calls_accumulate_like_one_over_all_rows() -> None:
    """Two micro batches, divided by the global count, are the whole batch."""
    hidden_ND, weight_VD, labels_N, rows = case()
    (run(hidden_ND, weight_VD, labels_N, rows).total / 48).backward()
    whole, weight_VD.grad = weight_VD.grad, None
    for part in (slice(0, 17), slice(17, 48)):
        (run(hidden_ND[part], weight_VD, labels_N[part], rows.select(part)).total / 48).backward()
    torch.testing.assert_close(weight_VD.grad, whole, rtol=1e-5, atol=1e-6)


def test_student_top_ids_are_the_largest_logits() -> None:
    hidden_ND, weight_VD, _, _ = case()
    bias_V = torch.randn(96)
    got = student_top_ids(hidden_ND, weight_VD, 5, head_bias_V=bias_V, shared_vocab=80, chunk_rows=7)
    want = (hidden_ND @ weight_VD.T + bias_V)[:, :80].topk(5, -1).indices
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="expected 1 to 96"):
        student_top_ids(hidden_ND, weight_VD, 97)


def test_rows_move_between_devices_whole() -> None:
    rows = dataclasses.replace(case()[3], teacher_head=Head(torch.randn(4, 3), torch.randn(4)))
    moved = rows.to("meta")
    assert moved.ids_NK is not None and moved.ids_NK.is_meta and moved.temperatures == (2.0,)
    assert moved.teacher_head is not None and moved.teacher_head.weight_VD.is_meta
    assert moved.teacher_head.bias_V is not None and moved.teacher_head.bias_V.is_meta


REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("expected \\[rows, width\\]", {"hidden": torch.randn(48, 15)}),
    ("expected one for each of 48 rows", {"labels": torch.zeros(47, dtype=torch.long)}),
    ("label 96 on row 0", {"labels": torch.full((48,), 96)}),
    ("all with different names", {"terms": [CE, CE]}),
    ("at least one", {"terms": []}),
    ("needs the target kind 'top_k'", {"rows": None}),
    ("needs the target kind 'hidden'", {"terms": [token_term("f", "jsd", 1.0, support="full")]}),
    ("request 3.0 from the teacher as well", {"terms": [token_term("kd", "top_k_kl", 1.0, temperature=3.0)]}),
    ("expected 1 to the student's vocabulary", {"shared_vocab": 97}),
    ("got weights \\(1,\\), expected one for each of 48 rows", {"weights_N": torch.ones(1)}),
    ("expected 1 or more", {"chunk_rows": -1}),
]


@pytest.mark.parametrize(("message", "change"), REFUSALS)
def test_what_does_not_fit_is_refused_with_what_was_expected(message: str, change: dict[str, Any]) -> None:
    hidden_ND, weight_VD, labels_N, rows = case()
    options = {key: change[key] for key in ("shared_vocab", "chunk_rows", "weights_N") if key in change}
    with pytest.raises(ValueError, match=message):
        head_loss(
            change.get("hidden", hidden_ND),
            weight_VD,
            change.get("labels", labels_N),
            change.get("rows", rows),
            change.get("terms", [CE, KD]),
            **options,
        )


def test_teacher_rows_that_cannot_be_right_are_refused() -> None:
    hidden_ND, weight_VD, labels_N, rows = case()
    assert rows.ids_NK is not None and rows.logprobs_NK is not None
    nan_NK = rows.logprobs_NK.clone()
    nan_NK[3, 2] = torch.nan
    twice_NG = rows.ids_NK.clone()
    twice_NG[:, 1] = twice_NG[:, 0]
    for message, wrong in (
        ("another vocabulary", dataclasses.replace(rows, ids_NK=rows.ids_NK + 90)),
        ("another vocabulary", dataclasses.replace(rows, ids_NK=rows.ids_NK - 96)),
        ("contain NaN", dataclasses.replace(rows, logprobs_NK=nan_NK)),
        ("K\\] for both", dataclasses.replace(rows, logprobs_NK=rows.logprobs_NK[:, 1:])),
        ("teacher rows for 48", dataclasses.replace(rows, valid_N=torch.ones(47, dtype=torch.bool))),
    ):
        with pytest.raises(ValueError, match=message):
            run(hidden_ND, weight_VD, labels_N, wrong)
    gathered = dataclasses.replace(rows, gather_ids_NG=twice_NG, gather_logprobs_NG=rows.logprobs_NK)
    with pytest.raises(ValueError, match="has the same id twice"):
        head_loss(hidden_ND, weight_VD, labels_N, gathered, [token_term("g", "reverse_kl", 1.0, support="gather")])


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("expected one of", {"kind": "kl"}),
        (r"(?s)support\n  Input should be 'top_k' .*'gather'", {"kind": "top_k_kl", "support": "gather"}),
        (r"(?s)temperature\n  Input should be greater than 0", {"kind": "jsd", "temperature": 0.0}),
        (r"x\.temperature is not a setting of kind cross_entropy", {"kind": "cross_entropy", "temperature": 2.0}),
        ("forward_kl \\(0\\)", {"kind": "jsd", "beta": 0.0}),
        (r"(?s)alpha\n  Input should be less than 1", {"kind": "skewed_kl", "alpha": 1.0}),
        ("'bucket', 'renormalise' or 'truncate'", {"kind": "jsd", "tail": "ghost"}),
        (r"tail is truncate, which only works with KL", {"kind": "jsd", "tail": "truncate"}),
        ("finite", {"kind": "jsd", "coefficient": float("nan")}),
        (
            r"x\.alpha is not a setting of kind cross_entropy, only of skewed_kl, ",
            {"kind": "cross_entropy", "alpha": 0.3},
        ),
        (r"x\.tail is not a setting of kind cross_entropy", {"kind": "cross_entropy", "tail": "renormalise"}),
        (r"x\.beta is not a setting of kind skewed_kl, only of jsd", {"kind": "skewed_kl", "beta": 0.3}),
        (r"x\.tail is not a setting of kind sampled", {"kind": "sampled", "tail": "bucket"}),
    ],
)
def test_terms_out_of_range_are_refused(message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        token_term(**{"name": "x", "coefficient": 1.0} | settings)


def test_settings_without_effect_are_named() -> None:
    def unused(kind: str, **settings: Any) -> list[str]:
        return KINDS[kind](kind=kind, **settings).without_effect()

    assert unused("top_k_kl", temperature_squared=True) == ["temperature_squared"]
    assert unused("jsd", temperature=2.0, tail="renormalise", temperature_squared=True, beta=0.1) == []
    assert unused("jsd", tail="renormalise", support="full") == ["tail"]
    assert unused("sampled") == []


def test_every_kind_has_settings_a_class_and_a_formula() -> None:
    """A kind that is written down in one place alone is found here, and not when a run names it."""
    assert TERMS.keys() == KINDS.keys() | {"attention_relations"}
    named = {value for kind in KINDS.values() for value in _literals(kind, "support")}
    assert named == SUPPORTS.keys()
    fields = {field.name for field in dataclasses.fields(TeacherRows)}
    assert all(set(support.fields) <= fields for support in SUPPORTS.values())
    assert {support.kind for support in SUPPORTS.values()} <= set(REQUEST_KINDS)


def test_what_several_terms_need_of_a_teacher_adds_up() -> None:
    """Normalisers where probabilities on given ids are softened, hidden states need none; gather is asked for late."""
    attention = term_of("attention", AttentionSettings(coefficient=1.0, layer=0.5, transport="int8"))
    terms = [
        CE,
        token_term("kl", "forward_kl", temperature=2.0),
        token_term("one", "tvd"),
        token_term("drawn", "sampled", temperature=3.0),
        token_term("whole", "jsd", temperature=4.0, support="full"),
        attention,
    ]
    needs = Needs.of(terms)
    assert needs.kinds == needs.ahead == {"top_k", "sampled", "hidden"} and not needs.late
    assert needs.temperatures == {2.0} and needs.sampled_at == {3.0} and needs.layers == {(0.5, "int8")}
    needs = Needs.of([*terms, token_term("own", "reverse_kl", temperature=5.0, support="gather")])
    assert needs.late == {"gather"} and needs.ahead == {"top_k", "sampled", "hidden"}
    assert needs.temperatures == {2.0, 5.0}
    assert Needs.of([CE]) == Needs() and not Needs.of([attention]).kinds


def test_states_of_two_layers_at_a_time_are_refused() -> None:
    terms = [term_of(f"at_{layer}", AttentionSettings(coefficient=1.0, layer=layer)) for layer in (0, 1)]
    with pytest.raises(ValueError, match="at_0, at_1 need the teacher's states in 2 forms"):
        AttentionSource(lambda: None, terms, TeacherSettings(), 16)  # type: ignore[arg-type, return-value]


def _literals(settings: type[TermSettings], field: str) -> tuple[str, ...]:
    return get_args(settings.model_fields[field].annotation) if field in settings.model_fields else ()
