"""Sketches of gradients by source against the gradients themselves, of every kind of student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.batch.align import cut
from student_trainer.batch.batch import Placed, build_batch
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import ViewSeed
from student_trainer.losses.kinds import token_term
from student_trainer.settings import Settings
from student_trainer.students import gradient_sketches
from student_trainer.students.gradient_sketches import GradientSketches, choose, sketch
from student_trainer.students.load import student_from_model
from student_trainer.students.student import Student
from tests.models import save_tiny_llama

TERMS = (token_term("cross_entropy", "cross_entropy"),)
SOURCES = 4
STUDENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bitnet": {"quantiser": "bitnet"},
    "lora": {"lora": {"rank": 4}},
    "lora on bitnet": {"quantiser": "bitnet", "lora": {"rank": 4}},
    "diffusion": {"architecture": "diffusion", "diffusion": {"block_size": 4}},
    "bfloat16": {"compute": "bfloat16"},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("student"), num_hidden_layers=3)


def student_of(folder: Path, changes: dict[str, Any]) -> Student:
    given = {"checkpoint_path": str(folder), "compute": "float32", **changes}
    student = student_from_model(Settings.model_validate({"student": given}).student, torch.device("cpu"))
    with torch.no_grad():  # LoRA begins at zero, where half of its gradients are zero too
        draw = torch.Generator().manual_seed(1)
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    student.model.train()
    return student


def micro_batches(student: Student, seed: int = 0) -> tuple[MicroBatch, ...]:
    """Six rows in two passes, several documents of several sources a row."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(6):
        row, space = [], 48
        while space > 8:
            length = int(draw.integers(5, min(space, 24) + 1)) if space > 12 else space
            source = int(draw.integers(SOURCES))
            # Part of each source's tokens, less from one to the next, are drawn as source a's.
            own_N = draw.integers(2 + source * 20, 8 + source * 20, length)
            ids_N = np.where(draw.random(length) < 1 - source / SOURCES, draw.integers(2, 8, length), own_N)
            row.append(Placed(source, f"{source}", ids_N.astype(np.int32), None))
            space -= length
        rows.append(row)
    batch = build_batch(3, rows, 48, 0, tuple("abcd"))
    return cut(batch, None, student, ViewSeed(0), rows=3)


def sketched(student: Student, size: int, seed: int = 7, count: int = 4, data: int = 0) -> Tensor:
    sketches = GradientSketches(student, choose(student.model, ("down_proj",), count), SOURCES, size, seed)
    for micro in micro_batches(student, data):
        with sketches.watching(micro):
            loss = student.loss(micro, TERMS, None)
        (loss.total / 100).backward()
    return sketches.take()


def exact(student: Student, count: int = 4, data: int = 0) -> Tensor:
    """[SOURCES, numbers] by a backward pass for each source, all other labels left out of the loss."""
    parameters = [
        each.module.get_parameter(own)
        for each in choose(student.model, ("down_proj",), count)
        for own in each.parameters.values()
    ]
    gradients = []
    for source in range(SOURCES):
        student.model.zero_grad(set_to_none=True)
        for micro in micro_batches(student, data):
            weights_N = (micro.sources_N == source).float()
            if micro.view.weights_N is not None:
                weights_N = weights_N * micro.view.weights_N
            alone = replace(micro, view=replace(micro.view, weights_N=weights_N))
            (student.loss(alone, TERMS, None).total / 100).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    return torch.stack(gradients)


@pytest.mark.parametrize("kind", STUDENTS)
def test_what_is_sketched_is_the_gradient_of_the_sources_part(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of it: here each parameter's gradient is put, as it is, where no other's is."""
    student = student_of(folder, STUDENTS[kind])
    places: dict[int, int] = {}
    size = sum(p.numel() for p in student.model.parameters())

    def as_it_is(values: Tensor, size: int, seed: int) -> Tensor:
        start = places.setdefault(seed, len(places) * size // 8)
        return torch.nn.functional.pad(values.flatten(), (start, size - start - values.numel()))

    monkeypatch.setattr(gradient_sketches, "sketch", as_it_is)
    ours_SN = sketched(student, size)
    student.model.zero_grad(set_to_none=True)
    gradients_SN = exact(student)
    ours_SS, truth_SS = ours_SN @ ours_SN.T, gradients_SN @ gradients_SN.T
    loose = {"rtol": 2e-2, "atol": 1e-3} if kind == "bfloat16" else {"rtol": 1e-4, "atol": 1e-6}
    assert torch.allclose(ours_SS, truth_SS, **loose)
    assert torch.allclose(ours_SN.abs().sum(1), gradients_SN.abs().sum(1), **loose)


def test_the_gradients_of_the_update_are_what_they_are_without(folder: Path) -> None:
    student = student_of(folder, {})
    sketched(student, 64)
    watched = {name: p.grad.clone() for name, p in student.model.named_parameters()}
    student.model.zero_grad(set_to_none=True)
    for micro in micro_batches(student):
        (student.loss(micro, TERMS, None).total / 100).backward()
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter.grad, watched[name])
    assert not any(module._forward_hooks for module in student.model.modules())


def test_alignments_rank_as_exact_ones_at_the_default_size(folder: Path) -> None:
    """Spearman over the alignments of 8 batches' sources with a probe of source a: 0.95 or more."""
    student = student_of(folder, {})
    truth, ours = [], []
    probe_N, probe_R = exact(student, data=99)[0], sketched(student, 4096, data=99)[0]
    for data in range(8):
        student.model.zero_grad(set_to_none=True)
        truth += torch.cosine_similarity(exact(student, data=data), probe_N[None]).tolist()
        ours += torch.cosine_similarity(sketched(student, 4096, data=data), probe_R[None]).tolist()
    assert rank_correlation(truth, ours) >= 0.95
    assert max(abs(a - b) for a, b in zip(truth, ours, strict=True)) < 5 / 64


def test_a_sketch_is_a_pure_function_and_keeps_structured_matrices_apart() -> None:
    """All energy in one column or row, as an outlier's, is spread over the sums."""
    draw = torch.Generator().manual_seed(0)
    for shape in ((300, 64), (64, 300), (5000,), (8, 4096), (3, 5, 7)):
        a, b = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
        assert torch.equal(sketch(a, 256, 3), sketch(a.clone(), 256, 3))
        assert not torch.equal(sketch(a, 256, 3), sketch(a, 256, 4))
        assert torch.allclose(sketch(a, 256, 3) + sketch(b, 256, 3), sketch(a + b, 256, 3), atol=1e-4)
    column = torch.zeros(2048, 512)
    other = torch.zeros(2048, 512)
    column[:, 17], other[:, 17] = torch.randn(2048, generator=draw), torch.randn(2048, generator=draw)
    for seed in range(20):
        got = sketch(column, 4096, seed) @ sketch(other, 4096, seed)
        assert abs(got - (column * other).sum()) / column.norm() / other.norm() < 5 / 64
    assert (sketch(column, 4096, 0) != 0).float().mean() > 0.2


def test_at_most_so_many_modules_of_the_last_third_are_taken(folder: Path) -> None:
    model = student_of(folder, {}).model
    assert [name for each in choose(model, ("down_proj",), 4) for name in each.parameters] == [
        "model.layers.2.mlp.down_proj.weight"
    ]
    assert len(choose(model, ("down_proj", "up_proj", "gate_proj", "q_proj", "k_proj", "v_proj"), 3)) == 3
    with pytest.raises(ValueError, match="nothing is trained in modules named nowhere"):
        choose(model, ("nowhere",), 4)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, of numbers that are all different."""
    ranks = [np.argsort(np.argsort(each)) for each in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])
