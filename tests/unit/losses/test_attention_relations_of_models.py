"""The relation loss on states of real (random) models: transport error, and the regression of relations of maps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from student_trainer.losses.attention_relations import attention_relations
from student_trainer.students.capture import AttentionStates
from teacher_proto.compute.relations import FORMS, QKV, relations
from tests.unit.students.tiny import tiny_ids, tiny_model

ALL_FORMS = list(FORMS)


def model_states(model: torch.nn.Module) -> tuple[QKV, Tensor]:
    with torch.no_grad(), AttentionStates(model, 1) as taken:
        maps = model(tiny_ids(4, 64), use_cache=False, output_attentions=True).attentions[1]
    return taken.take(), maps


def as_int8(part: Tensor) -> Tensor:
    """One scale for each position's row, as the wire sends it."""
    flat = part.flatten(2)
    scale = flat.abs().amax(-1, keepdim=True) / 127
    return ((flat / scale).round() * scale).view(part.shape)


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_int8_transport_is_a_hundred_times_below_the_difference(form: str, heads: int) -> None:
    teacher, _ = model_states(tiny_model("llama", 0, attention="eager"))
    student, _ = model_states(tiny_model("qwen3", 1, attention="eager"))
    difference = attention_relations(student, teacher, form=form, relation_heads=heads).total
    transported = QKV(*(as_int8(part) for part in teacher))
    error = attention_relations(transported, teacher, form=form, relation_heads=heads).total
    assert 0 < error * 100 < difference, (error, difference)


def relation_of_maps(_states: QKV, maps_BHTT: Tensor) -> Tensor:
    """The planted regression: softmax(A A^T / sqrt(T)) of post-softmax maps in place of states."""
    return (maps_BHTT @ maps_BHTT.mT / math.sqrt(maps_BHTT.shape[-1])).softmax(-1)


def relation_of_states(form: str, heads: int) -> Callable[[QKV, Tensor], Tensor]:
    return lambda taken, _maps: torch.cat([relations(p, form=form, relation_heads=heads) for p in taken], dim=1)


def separates_unrelated_models(relation: Callable[[QKV, Tensor], Tensor]) -> bool:
    """Whether two unrelated models are told apart by more than the most that relations of maps can ever reach.

    Entries of a map lie in [0, 1] and rows sum to 1, so the KL of two such relations is at most 1 / (2T) a row.
    """
    first, second = tiny_model("llama", 0, attention="eager"), tiny_model("llama", 1, attention="eager")
    near = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.01 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    own, other, close = (relation(*model_states(model)) for model in (first, second, near))
    far = row_divergence(own, other)
    return far > 1 / (2 * own.shape[-1]) and far > 10 * row_divergence(own, close)


def row_divergence(p: Tensor, q: Tensor) -> float:
    return (p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log()).sum(-1).mean().item()


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_relations_of_states_separate_unrelated_models(form: str, heads: int) -> None:
    assert separates_unrelated_models(relation_of_states(form, heads))


def test_relations_of_maps_do_not_separate_unrelated_models() -> None:
    assert not separates_unrelated_models(relation_of_maps)
