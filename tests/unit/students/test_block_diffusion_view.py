"""A block-diffusion student through all that is not `students/`: teacher rows, losses, metrics, evaluation,
checkpoints, ids of its own choice. `tests/e2e/test_ranks.py` has it on two ranks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer import loop
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import EVALUATION, ViewSeed
from student_trainer.checkpoint import checkpoints as checkpoint
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.export import main as export
from student_trainer.data.mixture import MixtureState
from student_trainer.losses import head_loss, token_term
from student_trainer.losses.attention_relations import attention_relations
from student_trainer.losses.head import HeadLoss
from student_trainer.losses.kinds import term_of
from student_trainer.losses.metrics import LossSums
from student_trainer.settings import StudentSettings
from student_trainer.settings.attention import AttentionSettings
from student_trainer.students import load
from student_trainer.students.capture import AttentionStates
from student_trainer.students.load import student_from_model
from student_trainer.students.student import Student
from student_trainer.targets.guard import bad_tokens
from student_trainer.targets.prefetch import Ready
from student_trainer.targets.queries import queries_of
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.compute.relations import QKV
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_service.engines.scripted_model import scripted_head, scripted_hidden
from tests.block_diffusion import MASK, TOYS, BlockDiffusionReader, moved_by
from tests.models import VOCAB_SIZE
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, run_here, trace_of

SEED = ViewSeed(5)
READERS = {"in place": BlockDiffusionReader(), "shifted": BlockDiffusionReader(shift=True, weighted=False)}
SPEC = TargetSpec(("top_k",), 16)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(autouse=True)
def plugged_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, wrap in TOYS.items():
        monkeypatch.setitem(load.ARCHITECTURES, name, wrap)
    yield


def batch_of(*rows: list[int], seq_len: int = 24, number: int = 3, prompt: int = 0) -> Batch:
    """Rows of documents of the given lengths, of which the first `prompt` tokens are not learnt."""
    draw = np.random.default_rng(7)
    placed = [
        [
            Placed(d % 2, f"s:{r}:{d}", draw.integers(0, 60, n, dtype=np.int32), np.arange(n) >= prompt)
            for d, n in enumerate(lengths)
        ]
        for r, lengths in enumerate(rows)
    ]
    return build_batch(number, placed, seq_len, 0, ("x", "y"))


def targets_of(batch: Batch) -> BatchTargets:
    return asyncio.run(ScriptedTargets({"vocab_size": VOCAB_SIZE}).fetch(batch, queries_of(batch, SPEC)))


BATCH = batch_of([7, 12, 5], [24], [3, 9], [10], prompt=2)


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("name", READERS)
def test_label_and_teacher_row_travel_together_to_the_students_own_row(name: str, rows: int | None) -> None:
    reader = READERS[name]
    width, labels = BATCH.tokens_BT.shape[1], []
    for micro in cut(BATCH, targets_of(BATCH), reader, SEED, rows=rows):
        view, teacher = micro.view, micro.teacher
        if not len(view.labels_N):
            assert view.count and teacher is None  # nothing was masked here, but it might have been
            continue
        assert teacher is not None and teacher.next_logprob_N is not None and teacher.ids_NK is not None
        assert view.input_ids_BT.shape[1] == 2 * width
        documents = [d for d in BATCH.documents if micro.first_row <= d.row < micro.first_row + micro.rows]
        for n, place in enumerate(view.rows_N.tolist()):
            row, column = divmod(place, 2 * width)
            token = column + (1 if reader.shift else 0)  # the one that this row predicts
            row += micro.first_row
            assert column < width, "labels are predicted by the noisy half"
            assert int(view.labels_N[n]) == BATCH.tokens_BT[row, token]
            noisy_T, clean_T = view.input_ids_BT[row - micro.first_row].split(width)
            assert int(noisy_T[token]) == MASK and int(clean_T[token]) == int(view.labels_N[n])
            document = documents[int(micro.documents_N[n])]
            assert document.row == row and document.start < token < document.stop
            assert BATCH.source_names[int(micro.sources_N[n])] == document.source
            hidden = scripted_hidden(BATCH.tokens_BT[row, document.start : token])[-1]
            truth_V = torch.log_softmax(torch.from_numpy(scripted_head(VOCAB_SIZE) @ hidden), 0)
            assert float(teacher.next_logprob_N[n]) == pytest.approx(float(truth_V[view.labels_N[n]]), abs=1e-4)
            assert int(teacher.ids_NK[n, 0]) == int(truth_V.argmax())
            labels.append((row, token))
    assert sorted(labels) == sorted((b, t + 1) for b, t in zip(*BATCH.counted(), strict=True)), "each in one view"


def test_a_view_depends_on_seed_purpose_batch_and_row_alone() -> None:
    reader = BlockDiffusionReader()

    def inputs(batch: Batch, seed: ViewSeed = SEED) -> list[torch.Tensor]:
        return [view.input_ids_BT for view in reader.views(batch, seed)]

    whole = inputs(BATCH)
    for size in (1, 2, 3):
        parts = [inputs(BATCH.rows(first, first + size)) for first in range(0, 4, size)]
        for number, input_ids_BT in enumerate(whole):
            assert torch.equal(torch.cat([part[number] for part in parts]), input_ids_BT)
    # A rank's share of the batch, cut again.
    share = BATCH.rows(2, 4)
    assert torch.equal(inputs(share.rows(1, 2))[0], whole[0][3:4])
    assert torch.equal(inputs(BATCH)[1], whole[1])
    for other in (inputs(BATCH, ViewSeed(6)), inputs(BATCH, ViewSeed(5, EVALUATION)), inputs(replace(BATCH, number=4))):
        assert not torch.equal(other[0], whole[0])


# Five tokens, documents of four; the teacher's logits from the last two tokens, and the student's by row (noisy half).
TEXT = (3, 1, 4, 2)
STUDENT = ((0, 1, 2, 0.5, 1.5), (1, 0.2, 1.8, 0.4, 0), (0.5, 1.5, 0, 2, 1), (2, 0.3, 1, 0.6, 1.2))
GOLDEN = {  # by row choice and form: KL in nats at the masked tokens 1 and 3
    (False, "bucket"): (0.030402, 0.377924),
    (False, "renormalise"): (0.043061, 0.015955),
    (True, "bucket"): (0.337563, 0.731446),
    (True, "renormalise"): (0.339088, 0.764754),
}


class MaskedAt(BlockDiffusionReader):
    """The tokens 1 and 3 are masked in the first view."""

    def _noise(self, batch: Batch, seed: ViewSeed) -> tuple[np.ndarray, np.ndarray]:
        masked_BT = np.isin(batch.position_ids_BT, (1, 3))
        return np.full(masked_BT.shape, 0.5), masked_BT


@pytest.mark.parametrize(("shift", "tail"), GOLDEN)
def test_the_divergence_at_masked_tokens_is_that_of_the_reference(shift: bool, tail: Any) -> None:
    """Figures worked out apart from this code: the teacher's row l - 1 against the student's row l, or l - 1."""
    batch = build_batch(0, [[Placed(0, "x", np.array(TEXT, np.int32), None)]], 4, 0, ("x",))
    logits_TV = np.zeros((4, 5))
    for t in range(4):
        u1, u2 = TEXT[t], TEXT[t - 1] if t else 0
        v = np.arange(5)
        logits_TV[t] = ((2 * u1 + 3 * u2 + v * (u1 + 2) + v * v) % 7) / 2 + v / 10
    logprobs_TV = torch.log_softmax(torch.from_numpy(logits_TV), -1).numpy()
    order_TK = np.argsort(-logprobs_TV, 1, kind="stable")[:3, :2]
    answer = TokenTargets(
        start=0, ids=order_TK.astype(np.int32),
        logprobs=np.take_along_axis(logprobs_TV[:3], order_TK, 1).astype(np.float32),
    )  # fmt: skip
    first, _ = cut(batch, BatchTargets((answer,), TargetSpec(("top_k",), 2), ""), MaskedAt(shift=shift), SEED)
    noisy_TV = torch.tensor(STUDENT, dtype=torch.float64)
    hidden_ND = torch.cat([noisy_TV, torch.full((4, 5), torch.nan, dtype=torch.float64)])[first.view.rows_N]
    term = token_term("kl", "top_k_kl", 1.0, tail=tail)
    identity_VD = torch.eye(5, dtype=torch.float64)
    loss = head_loss(hidden_ND, identity_VD, first.view.labels_N, first.teacher, [term], weights_N=first.view.weights_N)
    assert loss.per_term["kl"].tolist() == pytest.approx(GOLDEN[shift, tail], abs=2e-6)
    # Each weighs 1 / 0.5, and the loss is divided by the three positions that might have been masked.
    assert float(loss.total) / first.view.count == pytest.approx(2 * sum(GOLDEN[shift, tail]) / 3, abs=2e-6)


def student_of(workshop: Workshop, name: str = "toy_in_place") -> Student:
    settings = StudentSettings(checkpoint_path=str(workshop.student), compute="float32", architecture=name)
    return student_from_model(settings, torch.device("cpu"))


def test_a_noisy_row_sees_its_own_block_and_what_is_clean_before_it(workshop: Workshop) -> None:
    """By the model's own forward pass: which of the row's inputs change what it computes."""
    student = student_of(workshop)
    batch = batch_of([11, 9], seq_len=20)
    view, width = student.views(batch, SEED)[0], 20
    for key, moved_T in enumerate(moved_by(student, view)):
        key_half, key_place = divmod(key, width)
        for query in range(2 * width):
            half, place = divmod(query, width)
            same = batch.document_ids_BT[0, place] == batch.document_ids_BT[0, key_place]
            block, key_block = (batch.position_ids_BT[0, at] // 4 for at in (place, key_place))
            if half == 0 and key_half == 0:
                seen = block == key_block
            elif half == 0:
                seen = key_block < block
            else:
                seen = key_half == 1 and key_block <= block
            assert bool(moved_T[query]) == bool(same and seen), (query, key)


@pytest.mark.parametrize("name", TOYS)
def test_loss_and_gradient_are_those_of_the_formula_however_the_batch_is_cut(workshop: Workshop, name: str) -> None:
    student = student_of(workshop, name)
    targets = targets_of(BATCH)
    terms = (token_term("ce", "cross_entropy", 0.5), token_term("kl", "top_k_kl", 1.0))

    def of(parts: tuple[MicroBatch, ...]) -> tuple[float, list[torch.Tensor]]:
        student.model.zero_grad()
        count, total = sum(part.view.count for part in parts), 0.0
        for part in parts:
            loss = student.loss(part, terms, None).total / count
            loss.backward()
            total += float(loss.detach())
        return total, [p.grad.clone() for p in student.model.parameters() if p.grad is not None]

    whole = cut(BATCH, targets, student, SEED)
    total, gradients = of(whole)
    for rows in (1, 2):
        other, others = of(cut(BATCH, targets, student, SEED, rows=rows))
        assert other == pytest.approx(total, rel=1e-5)
        for one, two in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
    expected, count = 0.0, 0
    for part in whole:
        z_NV = torch.log_softmax(student.logits(part).double(), -1)
        assert part.teacher is not None and part.teacher.ids_NK is not None and part.teacher.logprobs_NK is not None
        ids_NK, p_NK = part.teacher.ids_NK.long(), part.teacher.logprobs_NK.double().exp()
        tail_N, q_NK = 1 - p_NK.sum(-1), z_NV.exp().gather(1, ids_NK)
        kl_N = (p_NK * (p_NK / q_NK).log()).sum(-1) + tail_N * (tail_N / (1 - q_NK.sum(-1))).log()
        ce_N = -z_NV.gather(1, part.view.labels_N[:, None])[:, 0]
        weights_N = torch.ones_like(ce_N) if part.view.weights_N is None else part.view.weights_N.double()
        expected += float((weights_N * (0.5 * ce_N + kl_N)).sum())
        count += len(BATCH.counted()[0]) if student.reader.weighted else len(ce_N)  # type: ignore[attr-defined]
    assert total == pytest.approx(expected / count, rel=1e-3)


EVALUATED = ("evaluation.every=2", "evaluation.sample_tokens=4", "run.steps=4", "checkpoint.every=2")


@pytest.mark.parametrize("name", TOYS)
def test_a_run_learns_evaluates_and_resumes_to_the_same_bits(workshop: Workshop, tmp_path: Path, name: str) -> None:
    architecture = f"student.architecture={name}"
    arguments = workshop.settings(tmp_path / "whole", architecture, *EVALUATED)
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    whole = tmp_path / "whole" / "run"
    lines = lines_of(whole)
    for line in lines:
        assert line["loss"] == pytest.approx(line["weighted/cross_entropy"] + line["weighted/top_k_kl"], rel=1e-9)
    held_out = lines_of(whole, "evaluation.jsonl")
    assert held_out and all(0 < line["a"]["kl"] < 20 for line in held_out), held_out
    documents = lines_of(whole, "documents.jsonl")
    assert documents and all(line["tokens"] > 0 for line in documents)
    assert (whole / "passage.json").read_text() != "[]"

    part = workshop.settings(tmp_path / "part", architecture, *EVALUATED, "prefetch.depth=3", "data.workers=2")
    assert run_here([*part, "run.time_limit_s=1e-9"], ScriptedTargets()) == loop.DONE
    assert len(lines_of(tmp_path / "part" / "run")) == 1
    assert run_here(part, ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "part" / "run") == trace_of(whole)
    assert final_files(tmp_path / "part" / "run", 4) == final_files(whole, 4)


def test_a_run_that_read_from_left_to_right_is_gone_on_with_and_exported(workshop: Workshop, tmp_path: Path) -> None:
    """One stage follows another by a path, whatever reads: the second begins with the weights of the first."""
    assert run_here(workshop.settings(tmp_path / "first", "run.steps=2"), ScriptedTargets()) == loop.DONE
    first = tmp_path / "first" / "run"
    given = {"checkpoint_path": str(first), "compute": "float32"}
    read, reads = (
        load_student(StudentSettings(**given, architecture=name), torch.device("cpu"))
        for name in ("causal", "toy_in_place")
    )
    assert read.autoregressive and not reads.autoregressive
    assert all(torch.equal(read.tensors()[name], tensor) for name, tensor in reads.tensors().items())
    # The tokenizer is that of the model which the first stage began with.
    second = workshop.settings(tmp_path / "second", "student.architecture=toy_in_place", "run.steps=2")
    assert run_here([*second, f"student.checkpoint_path={first}"], ScriptedTargets()) == loop.DONE
    run, out = tmp_path / "second" / "run", tmp_path / "exported"
    assert export([str(run), "--format", "hf", "--out", str(out)]) == 0
    trained = checkpoint.newest(run / "checkpoints")
    assert trained is not None and trained.step == 2
    exported = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.tensors["model"].items())


def test_the_cut_into_micro_batches_changes_rounding_alone(workshop: Workshop, tmp_path: Path) -> None:
    runs = []
    for rows in ("1", "null"):
        arguments = workshop.settings(tmp_path / rows, "student.architecture=toy_in_place", "run.steps=3")
        assert run_here([*arguments, f"optim.micro_batch_rows={rows}"], ScriptedTargets()) == loop.DONE
        runs.append(trace_of(tmp_path / rows / "run"))
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_ids_of_the_students_own_choice_are_asked_for_at_its_labels(workshop: Workshop, tmp_path: Path) -> None:
    gather = ("distillation=none", "distillation.terms.reverse_kl.coefficient=1",
              "distillation.terms.reverse_kl.support=gather", "distillation.gather_k=8")  # fmt: skip
    arguments = workshop.settings(tmp_path, "student.architecture=toy_in_place", "run.steps=3", *gather)
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert all(0 < line["loss/reverse_kl"] < 20 for line in lines_of(tmp_path / "run"))


def test_a_student_that_does_not_write_is_not_let_write(workshop: Workshop, tmp_path: Path) -> None:
    arguments = workshop.settings(
        tmp_path, "student.architecture=toy_in_place", "on_policy=gkd", "on_policy.new_tokens=8"
    )
    with pytest.raises(ValueError, match="there is no sampler for architecture toy_in_place"):
        run_here(arguments, ScriptedTargets())


def test_states_are_compared_at_the_clean_half_and_weighed_by_label(workshop: Workshop) -> None:
    """Only there does a position hold what the teacher saw, and only there are there as many as the teacher has."""
    student = student_of(workshop)
    relation = term_of("attention", AttentionSettings(coefficient=3.0, relation_heads=8))
    states = [teacher_states(d.stop - d.start) for d in BATCH.documents]
    targets = replace(targets_of(BATCH), attention=tuple(states))
    for micro in cut(BATCH, targets, student, SEED, rows=2):
        terms = (token_term("ce", "cross_entropy", 1.0), relation)
        loss, plain = student.loss(micro, terms, None), student.loss(micro, terms[:1], None)
        with AttentionStates(student.model, 0) as watched:
            student.hidden(micro)
        taken, width = watched.take(), BATCH.tokens_BT.shape[1]
        documents = [d for d in BATCH.documents if micro.first_row <= d.row < micro.first_row + micro.rows]
        values = []
        for document, target in zip(BATCH.documents, states, strict=True):
            if document in documents:
                row, span = document.row - micro.first_row, slice(width + document.start, width + document.stop)
                ours = QKV(*(part[row : row + 1, span] for part in taken))
                theirs = QKV(*(torch.from_numpy(getattr(target, part))[None] for part in QKV._fields))
                alone = attention_relations(ours, theirs, form="official", relation_heads=8)
                values.append(float(alone.total.detach()) / alone.count)
        expected_N = torch.tensor(values)[micro.documents_N]
        torch.testing.assert_close(loss.per_term["attention"], expected_N, rtol=1e-4, atol=1e-7)
        assert micro.view.weights_N is not None
        added = float((loss.total - plain.total).detach())
        assert added == pytest.approx(3.0 * float(micro.view.weights_N @ expected_N), rel=1e-3)


@pytest.mark.parametrize("name", READERS)
def test_a_loss_that_is_not_finite_is_told_at_the_batchs_own_token(name: str) -> None:
    """Not at the place in the view, whose rows are twice as wide; the position is that before the token, as for all."""
    parts = cut(BATCH, None, READERS[name], SEED, rows=2)
    sums = LossSums((token_term("ce", "cross_entropy", 1.0),), BATCH.source_names)
    values = [torch.zeros(len(part.view.labels_N)) for part in parts]
    values[3][2] = torch.nan  # the second view of the last two rows
    for part, value_N in zip(parts, values, strict=True):
        counted_N = torch.ones_like(value_N, dtype=torch.bool)
        sums.add(HeadLoss(torch.zeros(()), {"ce": value_N}, {"ce": counted_N}), part)
    row, token = divmod(int(parts[3].view.rows_N[2]), 2 * BATCH.tokens_BT.shape[1])
    token -= 0 if READERS[name].shift else 1
    document = next(d for d in BATCH.documents if d.row == row + 2 and d.start <= token < d.stop)
    told = bad_tokens(sums, Ready(BATCH, MixtureState(0, ()), None, parts))
    assert told == f"ce is nan in source {document.source}, document {document.key}, row {row + 2} token {token}"


def teacher_states(length: int) -> AttentionTargets:
    draw = np.random.default_rng(length)
    query, key, value = (draw.normal(size=(length, 2, 32)).astype(np.float16) for _ in range(3))
    return AttentionTargets("states", 0, query=query, key=key, value=value)


def test_qk_clip_sees_the_logits_of_both_halves(workshop: Workshop, tmp_path: Path) -> None:
    muon = ("optim=muon_clip", "optim.qk_clip.tau=0.05", "run.steps=3", "student.architecture=toy_in_place")
    assert run_here(workshop.settings(tmp_path, *muon), ScriptedTargets()) == loop.DONE
    lines = lines_of(tmp_path / "run")
    assert any(line["attention/clipped_heads"] for line in lines), lines
