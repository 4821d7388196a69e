"""Laws that hold for any model, any rows and any split: order, padding, chunks, micro batches; K towards V."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.losses import Head, TeacherRows, TokenTerm, head_loss, token_term
from tests.unit.losses import dense

KINDS = ["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "tvd"]
SEEDS = st.integers(0, 2**31 - 1)
drawn_settings = st.fixed_dictionaries({
    "kind": st.sampled_from(KINDS),
    "temperature": st.sampled_from([0.7, 1.0, 2.0, 5.0]),
    "tail": st.sampled_from(["bucket", "renormalise"]),
    "temperature_squared": st.booleans(),
    "beta": st.just(0.4),
    "alpha": st.just(0.2),
})  # fmt: skip
terms_drawn = drawn_settings.map(lambda drawn: dense.term_of(**drawn))
# The same on every kind of target; samples have one loss, and the whole vocabulary has no tail.
terms_of_any_kind = st.one_of(
    terms_drawn,
    drawn_settings.map(lambda drawn: dense.term_of(**drawn, support="gather")),
    drawn_settings.map(lambda drawn: dense.term_of(**drawn, support="full")),
    drawn_settings.map(lambda drawn: dense.term_of(**drawn | {"kind": "sampled"})),
)
CE = token_term("ce", "cross_entropy", 0.5)


@dataclasses.dataclass(frozen=True)
class Case:
    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    labels_N: torch.Tensor
    rows: TeacherRows

    def gradients(self, terms: list[TokenTerm], index: torch.Tensor, chunk_rows: int) -> tuple[torch.Tensor, ...]:
        """(values of the last term, gradient by the rows' hidden states, gradient by the weight)."""
        hidden_ND = self.hidden_ND[index].requires_grad_()
        weight_VD = self.weight_VD.clone().requires_grad_()
        rows = dataclasses.replace(self.rows.select(index), sampled_temperature=terms[-1].temperature)
        result = head_loss(hidden_ND, weight_VD, self.labels_N[index], rows, terms, chunk_rows=chunk_rows)
        return result.per_term[terms[-1].name], *torch.autograd.grad(result.total, (hidden_ND, weight_VD))


def make(seed: int, n: int, vocab: int, k: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_NV = normal(n, vocab) * 3
    lse_N = teacher_NV.logsumexp(-1)
    top = (teacher_NV - lse_N[:, None]).topk(k, -1)
    temperatures = (0.7, 2.0, 5.0)
    log_z_NT = torch.stack([(teacher_NV / t).logsumexp(-1) - lse_N / t for t in temperatures], 1)
    labels_N = torch.randint(vocab, (n,), generator=generator)
    labels_N[torch.rand(n, generator=generator) < 0.2] = -100
    valid_N = torch.rand(n, generator=generator) < 0.8
    gathered_NG = torch.rand(n, vocab, generator=generator).topk(k, -1).indices
    drawn_NV = torch.randint(3, (n, vocab), generator=generator) * (torch.rand(n, vocab, generator=generator) < 0.3)
    drawn_NV[:, 0] += 1
    rows = TeacherRows(
        ids_NK=top.indices,
        logprobs_NK=top.values,
        lse_N=lse_N,
        log_z_NT=log_z_NT,
        temperatures=temperatures,
        valid_N=valid_N,
        gather_ids_NG=gathered_NG,
        gather_logprobs_NG=(teacher_NV - lse_N[:, None]).gather(1, gathered_NG),
        sampled_offsets=torch.cat([torch.zeros(1, dtype=torch.long), (drawn_NV > 0).sum(1).cumsum(0)]),
        sampled_ids=(drawn_NV > 0).nonzero()[:, 1],
        sampled_counts=drawn_NV[drawn_NV > 0],
        teacher_hidden_NE=teacher_NV,
        teacher_head=Head(torch.eye(vocab, dtype=torch.float64)),
    )
    return Case(normal(n, 6), normal(vocab, 6), labels_N, rows)


@settings(max_examples=120, deadline=None)
@given(SEEDS, st.integers(1, 24), st.integers(2, 40), st.data(), terms_of_any_kind)
def test_order_chunks_and_micro_batches_change_nothing(
    seed: int, n: int, vocab: int, data: st.DataObject, term: TokenTerm
) -> None:
    case = make(seed, n, vocab, data.draw(st.integers(1, vocab)))
    # The logarithm of a share of draws is float32, and rounded otherwise in a vector than alone.
    rtol, atol = (1e-6, 1e-6) if term.kind == "sampled" else (1e-8, 1e-10)
    value_N, by_hidden_ND, by_weight_VD = case.gradients([CE, term], torch.arange(n), 1000)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3))) if n > 1 else []
    total_VD = torch.zeros_like(by_weight_VD)
    for index in order.tensor_split(cuts):
        part_N, part_ND, part_VD = case.gradients([CE, term], index, data.draw(st.integers(1, n + 1)))
        torch.testing.assert_close(part_N, value_N[index], rtol=rtol, atol=atol)
        torch.testing.assert_close(part_ND, by_hidden_ND[index], rtol=rtol, atol=atol)
        total_VD += part_VD
    torch.testing.assert_close(total_VD, by_weight_VD, rtol=rtol, atol=atol)


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(1, 12), terms_of_any_kind)
def test_padding_rows_change_nothing_and_get_nothing(seed: int, n: int, padding: int, term: TokenTerm) -> None:
    case = make(seed, n + padding, 20, 5)
    assert case.rows.valid_N is not None
    case.labels_N[n:] = -100
    case.rows.valid_N[n:] = False
    alone = case.gradients([CE, term], torch.arange(n), 7)
    padded = case.gradients([CE, term], torch.arange(n + padding), 7)
    rtol, atol = (1e-6, 1e-6) if term.kind == "sampled" else (1e-7, 1e-7)
    torch.testing.assert_close(padded[0][:n], alone[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(padded[1][:n], alone[1], rtol=rtol, atol=atol)
    torch.testing.assert_close(padded[2], alone[2], rtol=rtol, atol=atol)
    assert not bool(padded[0][n:].any()) and not bool(padded[1][n:].any())


@settings(max_examples=60, deadline=None)
@given(SEEDS, drawn_settings)
def test_buckets_never_exceed_the_whole_and_reach_it_as_k_grows(seed: int, drawn: dict[str, Any]) -> None:
    """Merging ids into a bucket loses information: the divergence grows with K and ends at the full one."""
    vocab = 24
    term = dense.term_of(**drawn | {"tail": "bucket"})
    with torch.no_grad():
        cases = [make(seed, 6, vocab, k) for k in (1, 4, 12, vocab)]
        values = [
            head_loss(case.hidden_ND, case.weight_VD, case.labels_N, case.rows, [term]).per_term["kd"] for case in cases
        ]
        full = dense.term_of(**drawn, support="full")
        whole_N = head_loss(cases[0].hidden_ND, cases[0].weight_VD, cases[0].labels_N, cases[0].rows, [full]).per_term[
            "kd"
        ]
    for smaller_N, larger_N in zip(values, [*values[1:], whole_N], strict=True):
        assert bool((smaller_N <= larger_N + 1e-6).all())
    torch.testing.assert_close(values[-1], whole_N, rtol=1e-6, atol=1e-6)
    assert bool((values[0] >= -1e-6).all())


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([1.0, 2.0, 5.0]), st.integers(1, 30))
def test_chain_rule_of_the_kl(seed: int, temperature: float, k: int) -> None:
    """KL(p‖q) = KL over K + 1 buckets + tail mass * KL between the tails, with the in-support part inside the first."""
    case = make(seed, 8, 30, k)
    with torch.no_grad():
        bucketed, whole = (
            head_loss(
                case.hidden_ND,
                case.weight_VD,
                case.labels_N,
                case.rows,
                [token_term("kd", "forward_kl", 1.0, temperature=temperature, support=support)],
            ).per_term["kd"]
            for support in ("top_k", "full")
        )
    assert case.rows.teacher_hidden_NE is not None and case.rows.ids_NK is not None and case.rows.valid_N is not None
    tail_NV = torch.ones(8, 30, dtype=torch.bool).scatter(1, case.rows.ids_NK, False)
    p_NV = (case.rows.teacher_hidden_NE / temperature).softmax(-1) * tail_NV
    q_NV = (case.hidden_ND @ case.weight_VD.T / temperature).softmax(-1) * tail_NV
    mass_N = p_NV.sum(-1)
    ratio_NV = (p_NV / mass_N[:, None]) / (q_NV / q_NV.sum(-1, keepdim=True))
    within_N = torch.where(tail_NV, p_NV * ratio_NV.log(), 0.0).sum(-1)
    torch.testing.assert_close(
        whole, torch.where(case.rows.valid_N, bucketed + within_N.nan_to_num(), 0.0), rtol=1e-5, atol=1e-6
    )
