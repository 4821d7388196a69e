"""Runs a student's decoder layer by layer, so that a layer's inputs can be read before the layer itself is final.
Called by `calibrate` and `sub_norms`.

The model's own pass is made once per micro batch, with every layer replaced by the identity: what a layer is called
with, masks and positions, is kept, and from then on each layer is called on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.students.causal import decoder_layers
from student_trainer.students.quant_linear import QuantLinear, quant_linears
from student_trainer.students.quantisers.quantiser import Quantiser
from student_trainer.students.student import Student


@dataclass(frozen=True, eq=False)
class Entrance:
    """The input of a micro batch to the decoder's layers: hidden states [B, T, D], and by layer the other arguments.
    `real_N`: which of the B T positions are of documents, not padding.
    """

    hidden_BTD: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    real_N: Tensor


class Reached(Exception):
    """The linear whose input is wanted has been called."""


@contextmanager
def standing_still(student: Student) -> Iterator[list[nn.Module]]:
    """The decoder's layers, in evaluation mode and not compiled, so that each can be called alone and cut short."""
    layers = decoder_layers(student.model)
    compiled = [layer._compiled_call_impl for layer in layers]
    try:
        for layer in layers:
            # Code that is already compiled does not see hooks and replaced `forward`s.
            layer._compiled_call_impl = None
        with student.resting():
            yield layers
    finally:
        for layer, was in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = was


def enter(student: Student, layers: Sequence[nn.Module], micro: MicroBatch) -> Entrance:
    """The input of the micro batch to the layers."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def keep(hidden_states: Tensor, *rest: Any, **more: Any) -> Tensor:
        first.append(hidden_states)
        # Masks, positions and rotary embeddings: made once by the model, the same in both passes of the text.
        calls.append((rest, more))
        return hidden_states

    with ExitStack() as stack:
        for layer in layers:
            # Each layer returns its input, so the model's own pass costs next to nothing.
            layer.forward = keep
            stack.callback(delattr, layer, "forward")
        view = micro.view
        with student.autocast():
            student.body(view.input_ids_BT, view.position_ids_BT, view.attention)
    real_N = (view.attention.document_ids_BT >= 0).flatten()
    return Entrance(first[0], tuple(calls), real_N)


def call(layer: nn.Module, hidden_BTD: Tensor, entrance: Entrance, number: int) -> Tensor:
    """The output of layer `number` on these hidden states."""
    rest, more = entrance.calls[number]
    made = layer.forward(hidden_BTD, *rest, **more)
    output_BTD: Tensor = made[0] if isinstance(made, tuple) else made
    return output_BTD


def input_of(linear: nn.Module, run: Callable[[], object]) -> Tensor | None:
    """The input of `linear` in the pass `run`, which ends there; None if it is never called."""
    found: list[Tensor] = []

    def reach(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        # The rest of the pass would be thrown away.
        raise Reached

    hook = linear.register_forward_pre_hook(reach)
    try:
        run()
    except Reached:
        pass
    finally:
        hook.remove()
    return found[0] if found else None


def groups(layer: nn.Module, run: Callable[[], object]) -> list[list[QuantLinear]]:
    """The layer's quantised linears in the order in which the pass `run` calls them, grouped by shared input."""
    order: list[tuple[Tensor, list[QuantLinear]]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, QuantLinear)
        for seen, group in order:
            # The same tensor, not an equal one: q, k and v of one norm's output share their second moment.
            if seen is args[0]:
                group.append(module)
                return
        order.append((args[0], [module]))

    hooks = [linear.register_forward_pre_hook(note) for _, linear in quant_linears(layer)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [group for _, group in order]


class _Rounded(Quantiser):
    """Returns a weight that was quantised once, in place of the quantiser that does so in every pass."""

    name = "rounded"

    def __init__(self, linear: QuantLinear) -> None:
        self.bits = linear.weight_quantiser.bits
        self._quantised_OI = linear.weight_quantiser.weight(linear, torch.ones_like(linear.quantisation_blend))

    def weight(self, layer: nn.Linear, blend_: Tensor) -> Tensor:
        return self._quantised_OI if blend_.any() else layer.weight


@contextmanager
def quantised_once(layer: nn.Module) -> Iterator[None]:
    """The layer with weights that are quantised once, not again in each of many passes."""
    linears = [linear for _, linear in quant_linears(layer)]
    quantisers = [linear.weight_quantiser for linear in linears]
    try:
        for linear in linears:
            linear.weight_quantiser = _Rounded(linear)
        yield
    finally:
        for linear, quantiser in zip(linears, quantisers, strict=True):
            linear.weight_quantiser = quantiser


@contextmanager
def in_full_precision(layer: nn.Module) -> Iterator[None]:
    """The layer as before quantisation, without corrections."""
    linears = [linear for _, linear in quant_linears(layer)]
    kept = [(linear.quantisation_blend.clone(), linear.correction) for linear in linears]
    try:
        for linear in linears:
            linear.quantisation_blend.zero_()
            linear.correction = None
        yield
    finally:
        for linear, (blend, correction) in zip(linears, kept, strict=True):
            linear.quantisation_blend.copy_(blend)
            linear.correction = correction
