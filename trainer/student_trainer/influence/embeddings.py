"""Cheap document embeddings: how the last hidden state of a document changes when the student's weights change.

Called by `measure`. The first blocks' weights are perturbed along a few random directions, and the change of the last
counted token's state after those blocks is measured (the JVP embeddings of arXiv 2505.19051). Derivatives are central
differences in float32. They take two short forward passes per direction and no automatic differentiation, so they work
for every student, also for a quantised one, whose weights are not a smooth function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.students.attention_hook import attention_modules
from student_trainer.students.student import Student

STEP = 1e-2  # relative to a tensor's root mean square


class _Reached(Exception):
    def __init__(self, hidden_BTD: Tensor) -> None:
        self.hidden_BTD = hidden_BTD


class FirstBlocks:
    """The first `blocks` blocks of a student, and the parameters up to them."""

    def __init__(self, student: Student, blocks: int) -> None:
        # Pinned to float32: in bf16 the difference of two passes would be mostly rounding.
        self._student = replace(student, compute=torch.float32)
        names = {module: name for name, module in student.model.named_modules()}
        found = [names[module].rpartition(".")[0] for module in attention_modules(student.model).values()][:blocks]
        if not found:
            raise ValueError(f"{type(student.model).__name__} has no attention layers that transformers dispatches")
        self._last = student.model.get_submodule(found[-1])
        inputs: Any = student.model.get_input_embeddings()
        owners = [inputs, *map(student.model.get_submodule, found)]
        self.parameters = list({id(p): p for owner in owners for p in owner.parameters()}.values())

    def __call__(self, micro: MicroBatch) -> Tensor:
        """[rows, D] float32: the state at the last label of each row, which holds one document; 0 if the view has no
        label in the row.
        """
        handle = self._last.register_forward_hook(_stop)
        try:
            self._student.hidden(micro)
        except _Reached as reached:
            hidden_ND = reached.hidden_BTD.flatten(0, 1)[micro.view.rows_N].float()
        finally:
            handle.remove()
        last_M = torch.full((micro.rows,), -1, dtype=torch.int64, device=hidden_ND.device)
        places_N = torch.arange(len(hidden_ND), device=hidden_ND.device)
        # A row is a document here, and its last label has the largest index.
        last_M.scatter_reduce_(0, micro.documents_N.to(hidden_ND.device), places_N, "amax")
        return hidden_ND[last_M] * (last_M >= 0).unsqueeze(1)


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)


@torch.no_grad()
def embed(first: FirstBlocks, micros: Sequence[MicroBatch], tangents: int, seed: int) -> Tensor:
    """[documents, tangents * D]: one unit vector per tangent. All micro batches use the same directions."""
    parts = []
    for tangent in range(tangents):
        states = []
        for sign in (1.0, -1.0):
            with moved(first.parameters, seed * 1009 + tangent, sign * STEP):
                states.append(torch.cat([first(micro) for micro in micros]))
        # f(w + h d) - f(w - h d): the directional derivative up to 1 / 2h, which normalisation removes.
        slope_ND = states[0] - states[1]
        parts.append(slope_ND / slope_ND.norm(dim=1, keepdim=True).clamp_min(1e-30))
    return torch.cat(parts, 1).cpu()


@contextmanager
def moved(parameters: Sequence[nn.Parameter], seed: int, step: float) -> Iterator[None]:
    """Within the block, the parameters are moved by `step` times their root mean square in a direction from `seed`."""
    before = [parameter.detach().clone() for parameter in parameters]
    draw = torch.Generator().manual_seed(seed)
    try:
        for parameter in parameters:
            direction = torch.randn(parameter.shape, generator=draw).to(parameter)
            size = float(parameter.detach().float().square().mean().sqrt())
            parameter.data.add_(direction, alpha=step * size)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            # Copied back: adding and subtracting the step would leave rounding errors.
            parameter.data.copy_(value)
