"""The relation loss against its formula in float64, and the properties that make it a loss of relations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.losses import attention_relations as module
from student_trainer.losses.attention_relations import attention_relations, document_spans
from teacher_proto.compute.relations import FORMS, PARTS, QKV, RelationForm

ALL_FORMS = list(FORMS)
# (heads, key-value heads, head width) of student and teacher: other widths, other GQA, all divisible by 4.
STUDENT, TEACHER = (4, 2, 6), (3, 1, 16)


def states(shape: tuple[int, int, int], rows: int = 2, length: int = 11, dtype: torch.dtype = torch.float32) -> QKV:
    heads, kv_heads, width = shape
    return QKV(*(torch.randn(rows, length, h, width).to(dtype) for h in (heads, kv_heads, kv_heads)))


def dense_loss(student: QKV, teacher: QKV, form: str, heads: int) -> Tensor:
    """The formula of science.md in float64 with autograd, on rows that are one document each: the batch's mean."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student, teacher, strict=True):
        logs = []
        for part_BTHd in (ours, theirs):
            rows, length = part_BTHd.shape[:2]
            part_BRTd = part_BTHd.double().reshape(rows, length, heads, -1).permute(0, 2, 1, 3)
            if form == "official":
                part_BRTd = part_BRTd / part_BRTd.norm(dim=-1, keepdim=True)
                relation = (part_BRTd @ part_BRTd.mT).softmax(-1).clamp(min=1e-8)
            else:
                scores = part_BRTd @ part_BRTd.mT / math.sqrt(part_BRTd.shape[-1])
                if form == "minilm":
                    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -1e30)
                relation = scores.softmax(-1)
            logs.append(relation.clamp(min=1e-300).log())
        divergence = torch.nn.functional.kl_div(logs[0], logs[1], log_target=True, reduction="none")
        # batchmean over the B * R * T relation rows; the released code divides by R once more.
        total = total + divergence.sum() / (rows * heads * length) / (heads if form == "official" else 1)
    return total


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("heads", [1, 4])
def test_value_and_gradient_follow_the_formula_in_float64(form: str, heads: int) -> None:
    student, teacher = states(STUDENT), states(TEACHER)
    for part in student:
        part.requires_grad_()
    loss = attention_relations(student, teacher, form=form, relation_heads=heads)
    (loss.total / loss.count).backward()
    exact = QKV(*(part.detach().double().requires_grad_() for part in student))
    expected = dense_loss(exact, teacher, form, heads)
    expected.backward()
    torch.testing.assert_close((loss.total / loss.count).double(), expected, rtol=1e-5, atol=1e-9)
    for ours, theirs in zip(student, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-7)


def test_gradient_respects_the_official_floor() -> None:
    """Cosine relations never reach 1e-8; with a floor that acts, what lies under it must not pull."""
    form = RelationForm("floored", cosine=False, floor=0.05)
    student, teacher = states(STUDENT, rows=1), states(TEACHER, rows=1)
    query = student.query.clone().requires_grad_()
    attention_relations(QKV(query, *student[1:]), teacher, form=form, relation_heads=2).total.backward()
    exact = student.query.double().requires_grad_()
    relation = []
    for part_BTHd in (exact, teacher.query.double()):
        part_RTd = part_BTHd.reshape(11, 2, -1).transpose(0, 1)
        relation.append((part_RTd @ part_RTd.mT / math.sqrt(part_RTd.shape[-1])).softmax(-1))
    assert (relation[0] < 0.05).any() and (relation[0] > 0.05).any()
    ours, theirs = (part.clamp(min=0.05) for part in relation)
    ((theirs * (theirs / ours).log()).sum() / 2).backward()
    torch.testing.assert_close(query.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_student_equal_to_teacher_gives_zero(form: str) -> None:
    student = states(STUDENT, length=40)
    for part in student:
        part.requires_grad_()
    loss = attention_relations(student, student, form=form, relation_heads=4)
    loss.total.backward()
    assert abs(loss.total.item() / loss.count) < 1e-6
    assert all(part.grad.abs().max() < 1e-5 for part in student)


def test_parts_add_up_and_sums_add_over_micro_batches() -> None:
    student, teacher = states(STUDENT, rows=3), states(TEACHER, rows=3)
    whole = attention_relations(student, teacher, form="paper", relation_heads=4)
    assert set(whole.per_part) == set(PARTS) and whole.count == 33
    torch.testing.assert_close(sum(whole.per_part.values()), whole.total)
    pieces = [
        attention_relations(
            QKV(*(p[r] for p in student)), QKV(*(p[r] for p in teacher)), form="paper", relation_heads=4
        )
        for r in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(piece.total for piece in pieces), whole.total)
    assert sum(piece.count for piece in pieces) == whole.count


@pytest.mark.parametrize("form", ALL_FORMS)
def test_packed_documents_equal_the_documents_alone_and_padding_is_never_read(form: str) -> None:
    student, teacher = states(STUDENT, rows=2, length=12), states(TEACHER, rows=2, length=12)
    ids_BT = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12])
    spans = [(0, 0, 5), (0, 5, 9), (1, 0, 12)]
    for part in (*student, *teacher):
        part[0, 9:] = float("nan")
    packed = attention_relations(student, teacher, form=form, relation_heads=4, document_ids_BT=ids_BT)
    alone = [
        attention_relations(
            QKV(*(p[row, None, a:b] for p in student)), QKV(*(p[row, None, a:b] for p in teacher)),
            form=form, relation_heads=4,
        )
        for row, a, b in spans
    ]  # fmt: skip
    assert packed.count == 21
    torch.testing.assert_close(packed.total, sum(loss.total for loss in alone))
    listed = [QKV(*(p[row, a:b] for p in teacher)) for row, a, b in spans]
    by_list = attention_relations(student, listed, form=form, relation_heads=4, document_ids_BT=torch.tensor(ids_BT))
    torch.testing.assert_close(by_list.total, packed.total)


def test_no_block_reaches_beyond_its_document_or_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def watched(factor_RTd: Tensor, rows_r: Tensor, form: RelationForm) -> Tensor:
        block = original(factor_RTd, rows_r, form)
        shapes.append(tuple(block.shape))
        return block

    original = module.similarity_rows
    monkeypatch.setattr(module, "similarity_rows", watched)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 2 * 7 * 4)
    ids_BT = np.array([[0] * 7 + [1] * 3 + [-1] * 90])
    attention_relations(
        states(STUDENT, 1, 100),
        states(TEACHER, 1, 100),
        form="paper",
        relation_heads=2,
        document_ids_BT=ids_BT,
    )
    assert set(shapes) == {(2, 4, 7), (2, 3, 7), (2, 3, 3)}


@pytest.mark.parametrize("form", ALL_FORMS)
def test_chunks_equal_the_whole_gradients_included(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = states(TEACHER)
    base = states(STUDENT)
    results = []
    for rows in (11, 1, 4):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 4 * 11 * rows)
        student = QKV(*(part.clone().requires_grad_() for part in base))
        loss = attention_relations(student, teacher, form=form, relation_heads=4)
        loss.total.backward()
        results.append([loss.total.detach(), *(part.grad for part in student)])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_rotating_and_permuting_within_a_relation_head_changes_nothing(form: str) -> None:
    student, teacher = states(STUDENT), states(TEACHER)

    def parts_of(changed: QKV) -> Tensor:
        loss = attention_relations(changed, teacher, form=form, relation_heads=4)
        return torch.stack([loss.per_part[part] for part in PARTS])

    expected_3 = parts_of(student)
    turned = []
    for part in student:
        split = part.reshape(2, 11, 4, -1)
        width = split.shape[-1]
        rotation, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
        turned.append((split.double() @ rotation).float()[..., torch.randperm(width)].reshape(part.shape))
    torch.testing.assert_close(parts_of(QKV(*turned)), expected_3, rtol=1e-5, atol=1e-7)
    across = QKV(
        *(part.reshape(2, 11, -1)[..., torch.randperm(part[0, 0].numel())].reshape(part.shape) for part in student)
    )
    # One part may come close by chance, all three do not.
    assert ((parts_of(across) / expected_3 - 1).abs() > 1e-3).any()


def test_relation_heads_must_divide_both_widths() -> None:
    with pytest.raises(ValueError, match=r"5 do not divide the width 24 \(4 heads of 6\)"):
        attention_relations(states(STUDENT), states(TEACHER), form="official", relation_heads=5)
    with pytest.raises(ValueError, match=r"12 do not divide the width 16 \(1 heads of 16\)"):
        attention_relations(states((4, 2, 6)), states(TEACHER), form="official", relation_heads=12)


def test_a_teacher_of_other_documents_is_refused() -> None:
    student = states(STUDENT, rows=1)
    with pytest.raises(ValueError, match=r"teacher states are \(1, 10\), the student's \(1, 11\)"):
        attention_relations(student, states(TEACHER, 1, 10), form="paper", relation_heads=2)
    document = QKV(*(part[0] for part in states(TEACHER, 1, 10)))
    with pytest.raises(ValueError, match="document 0: the teacher saw 10 tokens, the student 11"):
        attention_relations(student, [document], form="paper", relation_heads=2)
    with pytest.raises(ValueError, match="returned 2 documents, but the student's batch has 1"):
        attention_relations(student, [document, document], form="paper", relation_heads=2)
    with pytest.raises(ValueError, match=r"document ids: got shape \(1, 3\)"):
        attention_relations(student, student, form="paper", relation_heads=2, document_ids_BT=np.zeros((1, 3), int))


def test_spans_are_the_runs_of_an_id() -> None:
    ids_BT = np.array([[0, 0, 1, 1, 1, -1], [-1, -1, -1, -1, -1, -1], [0, 2, 2, -1, 3, 3]])
    assert document_spans(ids_BT, (3, 6)) == [(0, 0, 2), (0, 2, 5), (2, 0, 1), (2, 1, 3), (2, 4, 6)]


def test_an_empty_batch_gives_zero_with_a_count_of_zero() -> None:
    student = states(STUDENT, rows=1)
    loss = attention_relations(student, student, form="paper", relation_heads=2, document_ids_BT=np.full((1, 11), -1))
    assert loss.count == 0 and loss.total.item() == 0.0


def test_half_precision_states_are_compared_in_float32_under_autocast() -> None:
    student, teacher = states(STUDENT, dtype=torch.bfloat16), states(TEACHER, dtype=torch.float16)
    upcast = attention_relations(
        QKV(*(p.float() for p in student)), QKV(*(p.float() for p in teacher)), form="paper", relation_heads=4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention_relations(student, teacher, form="paper", relation_heads=4)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, upcast.total, rtol=1e-6, atol=0)
