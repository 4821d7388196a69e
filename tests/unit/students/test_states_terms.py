"""Any term on states of a forward pass: in the sum, in the figures, with weights, and where gradients are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from student_trainer.batch.align import cut
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import ViewSeed
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.losses import token_term
from student_trainer.losses.terms import Capture, Captured, Needs, StatesTerm, Term
from student_trainer.settings import LoRASettings, StudentSettings
from student_trainer.settings.terms import TermSettings
from student_trainer.students.student import Student
from tests.models import save_tiny_llama
from tests.unit.trainer.test_align import batch_of

CE = token_term("cross_entropy", "cross_entropy", 0.5)


class Settings(TermSettings):
    kind: Literal["square"] = "square"


@dataclass(frozen=True)
class HiddenSquare(StatesTerm):
    """Of the final hidden rows alone."""

    @property
    def needs(self) -> Needs:
        return Needs()

    def values(self, captured: Captured, micro: MicroBatch, config: Any) -> Tensor:
        return captured.hidden_ND.float().square().sum(-1)


@dataclass(frozen=True)
class KeySquare(HiddenSquare):
    """Of the keys of every layer."""

    def capture(self, config: Any) -> Capture:
        return Capture(attention=frozenset(range(config.num_hidden_layers)))

    def values(self, captured: Captured, micro: MicroBatch, config: Any) -> Tensor:
        squares_BT = [captured.attention[layer].key.square().sum((2, 3)) for layer in sorted(captured.attention)]
        return torch.stack(squares_BT).sum(0).flatten()[micro.view.rows_N]


HIDDEN, KEYS = HiddenSquare("hidden", Settings(), 0.2), KeySquare("keys", Settings(), 0.3)


@pytest.fixture
def student(tmp_path: Path) -> Student:
    folder = save_tiny_llama(tmp_path / "student", num_hidden_layers=2)
    return load_student(StudentSettings(checkpoint_path=str(folder), compute="float32"), torch.device("cpu"))


def micro_of(student: Student) -> MicroBatch:
    (micro,) = cut(batch_of([9, 14], [20]), None, student, ViewSeed(0))
    return micro


def gradient_of(student: Student, micro: MicroBatch, terms: tuple[Term, ...]) -> dict[str, Tensor]:
    student.model.zero_grad()
    student.loss(micro, terms, None).total.backward()
    return {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("term", [HIDDEN, KEYS], ids=["hidden rows", "keys of two layers"])
def test_it_adds_its_weighted_values_and_their_gradient(student: Student, term: StatesTerm) -> None:
    micro = micro_of(student)
    weights_N = torch.linspace(0.0, 2.0, len(micro.view.labels_N))
    weighed = replace(micro, view=replace(micro.view, weights_N=weights_N))
    plain, loss = student.loss(weighed, (CE,), None), student.loss(weighed, (CE, term), None)
    values_N = loss.per_term[term.name]
    assert values_N.shape == weights_N.shape and bool((values_N > 0).all()) and not values_N.requires_grad
    assert bool(loss.counted[term.name].all())
    torch.testing.assert_close(loss.total, plain.total + term.coefficient * (weights_N * values_N).sum())
    both, ce, alone = (gradient_of(student, weighed, terms) for terms in ((CE, term), (CE,), (term,)))
    for name, gradient in both.items():
        zeros = torch.zeros_like(gradient)
        summed = ce.get(name, zeros) + alone.get(name, zeros)
        torch.testing.assert_close(gradient, summed, rtol=1e-4, atol=1e-5 * float(summed.abs().max()), msg=name)
    twice = replace(weighed, view=replace(weighed.view, weights_N=2 * weights_N))
    for name, gradient in gradient_of(student, twice, (term,)).items():
        torch.testing.assert_close(gradient, 2 * alone[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_gradients_are_measured_where_the_terms_meet(student: Student) -> None:
    """At the hidden rows, as long as all terms are on those; else at the weights that make the states."""
    micro = micro_of(student)
    hidden_ND = student.hidden(micro).detach()
    norms = student.gradient_norms(micro, (CE, HIDDEN), None)
    assert norms["hidden"] == pytest.approx(float(2 * hidden_ND.norm()), rel=1e-5)
    with_keys = student.gradient_norms(micro, (CE, KEYS, HIDDEN), None)
    made = ("q_proj", "k_proj", "v_proj")
    for term in (CE, KEYS, HIDDEN):
        gradient = gradient_of(student, micro, (replace(term, coefficient=1.0),))
        parts = [g for name, g in gradient.items() if any(part in name for part in made)]
        assert len(parts) == 6 or term is KEYS  # the keys' loss reaches no value of the last layer, and no query of it
        assert with_keys[term.name] == pytest.approx(float(torch.cat([g.flatten() for g in parts]).norm()), rel=1e-4)


@dataclass(frozen=True)
class LastKeySquare(KeySquare):
    """Of the keys of the last layer."""

    def capture(self, config: Any) -> Capture:
        return Capture(attention=frozenset({config.num_hidden_layers - 1}))


@pytest.mark.parametrize("target", ["down_proj", "o_proj"])
def test_where_an_adapter_leaves_query_key_and_value_frozen_all_that_is_trained_is_measured(
    tmp_path: Path, target: str
) -> None:
    folder = save_tiny_llama(tmp_path / "student", num_hidden_layers=2)
    settings = StudentSettings(
        checkpoint_path=str(folder), compute="float32", lora=LoRASettings(rank=4, targets=(target,))
    )
    student = load_student(settings, torch.device("cpu"))
    last, micro = LastKeySquare("last", Settings(), 0.3), micro_of(student)
    norms = student.gradient_norms(micro, (CE, last), None)
    for term in (CE, last):
        parts = gradient_of(student, micro, (replace(term, coefficient=1.0),)).values()
        whole = float(torch.cat([part.flatten() for part in parts]).norm())
        assert whole > 0 and norms[term.name] == pytest.approx(whole, rel=1e-4)


def test_a_layer_that_is_not_there_is_refused_before_anything_is_asked(student: Student) -> None:
    @dataclass(frozen=True)
    class Deep(KeySquare):
        def capture(self, config: Any) -> Capture:
            return Capture(attention=frozenset({7}))

    student.check_terms((CE, HIDDEN, KEYS))
    with pytest.raises(ValueError, match="attention layer 7: LlamaForCausalLM has layers 0 to 1"):
        student.check_terms((Deep("deep", Settings(), 1.0),))
