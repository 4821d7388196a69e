"""The states of a forward pass that terms of the loss compare: captured here, never by a term. Used by `student`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from student_trainer.losses.terms import Capture, Captured
from student_trainer.students.attention_hook import attention_module
from student_trainer.students.attention_states import AttentionStates

# What comes behind the states within an attention module, by the names that transformers gives it.
OUTPUT_PARTS = ("o_proj", "out_proj", "c_proj", "dense", "attn_sub_norm", "sinks")


@contextmanager
def capturing(model: Any, wanted: Capture) -> Iterator[Callable[[Tensor], Captured]]:
    """Around the student's forward pass; yields what makes the record of it, once, out of the final hidden rows."""
    with ExitStack() as stack:
        states = {
            layer: stack.enter_context(AttentionStates(model, layer)) for layer in sorted(wanted.attention)
        }  # fmt: skip
        yield lambda hidden_ND: Captured(hidden_ND, {layer: each.take() for layer, each in states.items()})


def check_capture(model: nn.Module, wanted: Capture) -> None:
    """ValueError where the model has not what is to be captured."""
    for layer in wanted.attention:
        attention_module(model, layer)


def parameters_behind(model: nn.Module, wanted: Capture) -> list[Tensor]:
    """The parameters that make the captured states: all that terms on them have in common with others is here and
    below. Empty where nothing but the final hidden rows is captured.
    """
    made = []
    for layer in sorted(wanted.attention):
        named = attention_module(model, layer).named_parameters()
        made += [each for name, each in named if each.requires_grad and not name.startswith(OUTPUT_PARTS)]
    return made
