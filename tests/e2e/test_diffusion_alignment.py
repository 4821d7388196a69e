"""Which of a served teacher's rows a block-diffusion student learns from: one that is the teacher, in the way of its
family, has nothing to learn; read in the other family's way it has much. Over HTTP from the real service.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.view import NEVER, Attention, OrderedDocuments, ViewSeed
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.losses import token_term
from student_trainer.settings import DiffusionSettings, StudentSettings, TeacherSettings
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.diffusion_record import DiffusionRecord
from student_trainer.students.student import Student
from student_trainer.targets.background import EventThread
from student_trainer.targets.open import open_teacher
from student_trainer.targets.queries import queries_of
from teacher_proto.requests import TargetSpec
from teacher_service.engines.scripted_model import scripted_head, scripted_hidden
from tests.models import VOCAB_SIZE, save_tiny_llama
from tests.teacher_process import TeacherProcess
from tests.trainer_run import TOKENS, teacher_script

MASK = VOCAB_SIZE - 1
FAMILIES = ("in_place", "token_shift")
TCS = (token_term("tcs", "tcs"),)
SEED = ViewSeed(3)


@pytest.fixture(scope="module")
def scripted() -> Iterator[TeacherProcess]:
    with TeacherProcess(script=teacher_script()) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Packed rows; of one document only the end is learnt."""
    draw = np.random.default_rng(2)
    rows = [
        [
            Placed(0, f"{r}:{d}", draw.integers(2, TOKENS, n, dtype=np.int32), np.arange(n) >= 5 * d)
            for d, n in enumerate(lengths)
        ]
        for r, lengths in enumerate(((13, 19), (32,), (9, 11, 10)))
    ]  # fmt: skip
    return build_batch(0, rows, 32, 0, ("x",))


def served_targets(teacher: TeacherProcess, batch: Batch) -> BatchTargets:
    settings = TeacherSettings(url=teacher.url, sanity="off")
    with ExitStack() as stack:
        thread = stack.enter_context(EventThread())
        targets = open_teacher(settings, thread, stack).targets
        return thread.call(targets.fetch(batch, queries_of(batch, TargetSpec(("top_k",), 16))))


class TheTeacherItself(nn.Module):
    """A body whose noisy row that predicts token l, by its family, is what the teacher computes of tokens 0..l-1."""

    def __init__(self, family: str):
        super().__init__()
        self.config = None  # that of no Hugging Face model: no term asks it anything
        self.anything = nn.Parameter(torch.zeros(1))
        self.family = family

    def forward(self, input_ids_BT: Tensor, position_ids_BT: Tensor, attention: Attention) -> Tensor:
        assert isinstance(attention, OrderedDocuments)
        rows, width = input_ids_BT.shape
        assert (attention.shown_at_BT[:, : width // 2] == NEVER).all()
        hidden_BTD = torch.full((rows, width, 32), 1.0)
        document_BT, clean_BT = (each[:, width // 2 :].numpy() for each in (attention.document_ids_BT, input_ids_BT))
        for row in range(rows):
            for document in range(document_BT[row].max() + 1):
                at = np.flatnonzero(document_BT[row] == document)
                computed_TD = torch.from_numpy(scripted_hidden(clean_BT[row, at])).float()
                if self.family == "in_place":
                    computed_TD = torch.cat([computed_TD[:1], computed_TD[:-1]])
                hidden_BTD[row, at] = computed_TD
        return hidden_BTD


def the_teacher_as_a_student(family: str, read_as: Any) -> Student:
    body = TheTeacherItself(family)
    head = nn.Linear(32, VOCAB_SIZE, bias=False)
    head.weight.data = torch.from_numpy(scripted_head(VOCAB_SIZE).copy()).float()
    reader = DiffusionReader(DiffusionRecord(4, MASK, read_as, "block_causal"))
    return Student(model=body, body=body, reader=reader, head_module=head)


def losses(student: Student, batch: Batch, targets: BatchTargets) -> Tensor:
    with torch.no_grad():
        parts = cut(batch, targets, student, SEED, rows=2)
        return torch.cat([student.loss(part, TCS, None).per_term["tcs"] for part in parts])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_the_teacher_has_nothing_to_learn_in_its_own_family_alone(
    scripted: TeacherProcess, batch: Batch, family: str
) -> None:
    targets = served_targets(scripted, batch)
    other = next(each for each in FAMILIES if each != family)
    own_N = losses(the_teacher_as_a_student(family, family), batch, targets)
    assert len(own_N) == len(batch.counted()[0])
    assert float(own_N.abs().max()) < 1e-5
    assert float(losses(the_teacher_as_a_student(family, other), batch, targets).mean()) > 0.3


def test_the_teachers_own_weights_have_nothing_to_learn_where_the_token_before_is_shown(
    batch: Batch, tmp_path: Path
) -> None:
    """A real model, served by the engine for Hugging Face models: blocks of one token with token_shift are the
    autoregressive model, but where a row reads a mask in the place of its own token.
    """
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    with TeacherProcess(str(folder), "--engine", "hf", "--dtype", "float32") as teacher:
        targets = served_targets(teacher, batch)

    def student(family: Any) -> Student:
        diffusion = DiffusionSettings(block_size=1, family=family)
        settings = StudentSettings(
            architecture="diffusion", checkpoint_path=str(folder), compute="float32", diffusion=diffusion
        )
        loaded = load_student(settings, torch.device("cpu"))
        loaded.shared_vocab = VOCAB_SIZE
        return loaded

    ours, compared = student("token_shift"), 0
    for micro in cut(batch, targets, ours, SEED):
        with torch.no_grad():
            tcs_N = ours.loss(micro, TCS, None).per_term["tcs"]
        shown_N = micro.view.input_ids_BT.flatten()[micro.view.rows_N] != VOCAB_SIZE
        assert float(tcs_N[shown_N].abs().max()) < 1e-5 and float(tcs_N[~shown_N].mean()) > 0.3
        compared += int(shown_N.sum())
    assert compared > 20
    assert float(losses(student("in_place"), batch, targets).mean()) > 0.3
