"""The relation term in whole runs: value, figures, gradient, the cut into micro batches, resume, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer import build_components as building
from student_trainer import loop
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import ViewSeed
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.compose import compose
from student_trainer.losses import Term, token_term
from student_trainer.losses.kinds import term_of
from student_trainer.settings import StudentSettings
from student_trainer.settings.attention import AttentionSettings
from student_trainer.students.capture import AttentionStates
from student_trainer.students.causal import CausalReader
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.compute.relations import QKV, relations
from teacher_proto.requests import TargetSpec
from tests.models import save_tiny_llama
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, run_here, trace_of
from tests.unit.trainer.test_align import batch_of

R = 8
RELATIONS = (f"distillation.attention.relation_heads={R}", "distillation.attention.coefficient=300")
CPU = torch.device("cpu")


def relation(coefficient: float, **settings: Any) -> Term:
    return term_of("attention", AttentionSettings(coefficient=coefficient, **{"relation_heads": R} | settings))


class StatesHere:
    """An attention source without a socket: a real model's states, document by document."""

    reason = ""

    def __init__(self, folder: Path, layer: int):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.layer = layer

    def of(self, tokens_T: np.ndarray) -> AttentionTargets:
        with torch.no_grad(), AttentionStates(self.model, self.layer) as states:
            self.model(torch.from_numpy(tokens_T.astype(np.int64))[None], use_cache=False)
        parts = {name: part[0].half().numpy() for name, part in states.take()._asdict().items()}
        return AttentionTargets("states", self.layer, **parts)

    async def fetch(self, batch: Batch) -> tuple[AttentionTargets, ...]:
        return tuple(self.of(batch.tokens_BT[d.row, d.start : d.stop]) for d in batch.documents)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> StatesHere:
    return StatesHere(save_tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7), layer=1)


@pytest.fixture
def beside(teacher: StatesHere, monkeypatch: pytest.MonkeyPatch) -> StatesHere:
    monkeypatch.setattr(building, "open_attention", lambda *_: teacher)
    return teacher


def test_every_term_acts_and_has_its_figures(workshop: Workshop, beside: StatesHere, tmp_path: Path) -> None:
    assert run_here(workshop.settings(tmp_path, *RELATIONS), ScriptedTargets()) == loop.DONE
    lines = lines_of(tmp_path / "run")
    for line in lines:
        parts = [line[f"weighted/{name}"] for name in ("cross_entropy", "top_k_kl", "attention")]
        assert all(np.isfinite(parts)) and min(parts) > 0
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-6)
        assert line["weighted/attention"] == pytest.approx(300 * line["loss/attention"], rel=1e-6)
    assert lines[0]["source/a/attention"] > 0 and lines[0]["source/b/attention"] > 0


def test_the_term_can_be_learnt(workshop: Workshop, teacher: StatesHere) -> None:
    student = load_student(StudentSettings(checkpoint_path=str(workshop.student), compute="float32"), CPU)
    micro = micro_of(*packed(teacher, [20, 25], [40]))
    terms = (token_term("cross_entropy", "cross_entropy", 0.0), relation(1e4))
    optimizer = torch.optim.Adam(student.model.parameters(), lr=1e-2)
    values = []
    for _ in range(15):
        loss = student.loss(micro, terms, None)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        values.append(float(loss.per_term["attention"].mean()))
    assert values[-1] < 0.7 * values[0]


def test_attention_alone_asks_the_teacher_for_no_tokens(workshop: Workshop, beside: StatesHere, tmp_path: Path) -> None:
    targets = ScriptedTargets()
    arguments = workshop.settings(tmp_path, "distillation=attention_only", *RELATIONS)
    assert run_here(arguments, targets) == loop.DONE
    assert not targets.fetched
    line = lines_of(tmp_path / "run")[-1]
    assert line["weighted/attention"] > 0 and "loss/top_k_kl" not in line


def test_the_cut_into_micro_batches_and_a_resume_change_nothing(
    workshop: Workshop, beside: StatesHere, tmp_path: Path
) -> None:
    whole = workshop.settings(tmp_path / "whole", *RELATIONS)
    assert run_here(whole, ScriptedTargets()) == loop.DONE
    cut = workshop.settings(tmp_path / "cut", *RELATIONS, "optim.micro_batch_rows=1", "run.steps=1")
    assert run_here(cut, ScriptedTargets()) == loop.DONE
    (ours,), theirs = lines_of(tmp_path / "cut" / "run"), lines_of(tmp_path / "whole" / "run")[0]
    assert ours["loss/attention"] == pytest.approx(theirs["loss/attention"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    again = workshop.settings(tmp_path / "again", *RELATIONS)
    assert run_here([*again, "prefetch.depth=3"], ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "again" / "run") == trace_of(tmp_path / "whole" / "run")
    assert final_files(tmp_path / "again" / "run", 12) == final_files(tmp_path / "whole" / "run", 12)


def test_balance_and_schedule_set_how_hard_the_term_pulls(
    workshop: Workshop, beside: StatesHere, tmp_path: Path
) -> None:
    """Measured at the weights of the compared layer's query, key and value, the one place where the terms meet."""
    shares = "distillation.balance.shares={cross_entropy: 3, attention: 1}"
    arguments = workshop.settings(tmp_path, *RELATIONS, shares, "distillation.balance.every=1", "run.steps=3")
    assert run_here([*arguments, "distillation=attention_only", "distillation.balance.ema=0"], ScriptedTargets()) == 0
    for line in lines_of(tmp_path / "run"):
        assert line["gradient_share/attention"] == pytest.approx(0.25, abs=1e-3), line
    scheduled = workshop.settings(tmp_path / "s", *RELATIONS, "distillation.attention.schedule=[[0,0.5],[2,1.0]]")
    assert run_here([*scheduled, "run.steps=3"], ScriptedTargets()) == loop.DONE
    ratios = [line["weighted/attention"] / line["loss/attention"] for line in lines_of(tmp_path / "s" / "run")]
    assert ratios == pytest.approx([150, 225, 300], rel=1e-5)


def packed(teacher: StatesHere, *lengths: list[int]) -> tuple[Batch, tuple[AttentionTargets, ...]]:
    batch = batch_of(*lengths, seq_len=48)
    return batch, tuple(teacher.of(batch.tokens_BT[d.row, d.start : d.stop]) for d in batch.documents)


def micro_of(batch: Batch, attention: tuple[AttentionTargets, ...]) -> MicroBatch:
    targets = BatchTargets((None,) * len(batch.documents), TargetSpec(()), "", attention)
    (micro,) = cut(batch, targets, CausalReader(), ViewSeed(0))
    return micro


def test_value_is_the_formula_of_each_label_s_document_and_gradients_add(
    workshop: Workshop, teacher: StatesHere
) -> None:
    student = load_student(StudentSettings(checkpoint_path=str(workshop.student), compute="float32"), CPU)
    batch, attention = packed(teacher, [9, 14, 1], [20])
    micro = micro_of(batch, attention)
    plain, relations_too = token_term("cross_entropy", "cross_entropy", 1.0), relation(2.0)
    gradients = {}
    for name, terms in {"ce": (plain,), "both": (plain, relations_too)}.items():
        student.model.zero_grad()
        loss = student.loss(micro, terms, None)
        loss.total.backward()
        gradients[name] = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
    states = AttentionStates(student.model, 0)
    student.model.zero_grad()
    with states:
        student.hidden(micro)
    taken = states.take()
    expected = torch.zeros(len(micro.view.labels_N), dtype=torch.float64)
    label = 0
    for document, targets in zip(batch.documents, attention, strict=True):
        length = document.stop - document.start
        value = _dense(taken, document, targets, length)
        count = int(batch.loss_mask_BT[document.row, document.start : document.stop].sum())
        expected[label : label + count] = value
        label += count
    values_N = loss.per_term["attention"]
    torch.testing.assert_close(values_N.double(), expected.detach(), rtol=1e-4, atol=1e-8)
    (2.0 * expected.sum()).backward()
    for name, parameter in student.model.named_parameters():
        alone = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        summed = gradients["ce"][name] + alone
        torch.testing.assert_close(gradients["both"][name], summed, rtol=1e-3, atol=1e-6, msg=name)
    changed = [n for n in gradients["ce"] if not torch.equal(gradients["both"][n], gradients["ce"][n])]
    assert {"q_proj", "k_proj", "v_proj"} <= {name.split(".")[-2] for name in changed}


def _dense(student: QKV, document: Any, targets: AttentionTargets, length: int) -> torch.Tensor:
    """The official reduction for one document, out of whole tables in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for part, ours in student._asdict().items():
        ours = ours[document.row, document.start : document.stop].double()
        theirs = torch.from_numpy(getattr(targets, part)).double()
        tables = []
        for states_THd in (theirs, ours):
            cut_RTd = states_THd.reshape(length, R, -1).transpose(0, 1)
            unit_RTd = cut_RTd / cut_RTd.norm(dim=-1, keepdim=True)
            tables.append((unit_RTd @ unit_RTd.mT).softmax(-1))
        total = total + (tables[0] * (tables[0] / tables[1]).log()).sum() / (R * R * length)
    return total


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    same = StatesHere(save_tiny_llama(tmp_path / "same", num_hidden_layers=1), layer=0)
    student = load_student(StudentSettings(checkpoint_path=str(tmp_path / "same"), compute="float32"), CPU)
    loss = student.loss(
        micro_of(*packed(same, [12, 30])),
        (token_term("cross_entropy", "cross_entropy", 1.0), relation(1.0)),
        None,
    )
    assert float(loss.per_term["attention"].max()) < 1e-7
    unit = relations(torch.randn(5, 2, 32), form="official", relation_heads=R)
    assert unit.shape == (R, 5, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relation_heads": 48}, r"relation_heads is 48, .* widths of the student \(query 64, key 32, value 32\)"),
        ({"student_layer": 3}, r"the student: attention layer: got 3, the model has layers 0 to 0"),
    ],
)
def test_what_the_student_has_not_is_refused(workshop: Workshop, changes: dict[str, Any], message: str) -> None:
    student = load_student(StudentSettings(checkpoint_path=str(workshop.student), compute="float32"), CPU)
    with pytest.raises(ValueError, match=message):
        student.check_terms([relation(1.0, **changes)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distillation.attention.layer=lowest", "expected one of"),
        ("distillation.attention.layer=1.5", "expected a fraction of the depth"),
        ("distillation.terms.x.kind=attention_relations", "are set under distillation.attention"),
        ("distillation.terms.attention.kind=jsd", "that name is reserved for the relation term"),
    ],
)
def test_settings_of_the_term_are_checked(workshop: Workshop, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(workshop.settings(tmp_path, "distillation.attention.coefficient=1", override))


def test_presets_carry_the_papers_coefficients_and_warn_of_what_has_no_effect() -> None:
    made = {
        name: compose([f"distillation={name}"]).distillation
        for name in ("bitdistill", "classification", "summarization", "attention_only", "logits_only")
    }
    gammas = {name: each.attention.coefficient for name, each in made.items()}
    kinds = ("top_k_kl", "label_kl")
    lambdas = {name: each.terms[k].coefficient for name, each in made.items() for k in kinds if k in each.terms}
    assert gammas == {
        "bitdistill": 1e5, "classification": 1e5, "summarization": 1e3, "attention_only": 1e5, "logits_only": None,
    }  # fmt: skip
    assert lambdas == {"bitdistill": 10, "classification": 10, "summarization": 1, "logits_only": 1}
    with pytest.warns(UserWarning, match="distillation.attention.form has no effect"):
        compose(["distillation.attention.form=paper"])
