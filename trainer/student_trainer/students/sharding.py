"""Shards a student's parameters over the ranks (FSDP2), and keeps a full copy for passes that a rank makes by itself.
Called by `build`.

Every decoder layer is gathered for its own pass and freed after it; embeddings, last norm and head, which the fused
loss needs in full, are gathered from the first layer's pass to the end of the backward pass. Gradients are summed over
the ranks, not averaged: the loop has divided by the number of tokens of all ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from student_trainer.ranks import Ranks, full_tensor
from student_trainer.students.causal import decoder_layers
from student_trainer.students.student import Student


class Gathered(nn.Module):
    """Calls a function while FSDP has the parameters of `model` gathered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)


def shard(student: Student, ranks: Ranks) -> None:
    """Keep only this rank's shard of every parameter; does nothing on a single rank. Call it before building the
    optimizer.
    """
    if ranks.alone:
        return
    mesh = init_device_mesh(student.device.type, (ranks.world,))
    gathered = Gathered(student.model)
    for module in (*decoder_layers(student.model), gathered):
        sharded: FSDPModule = fully_shard(module, mesh=mesh)
        # FSDP averages over the ranks by default; here the loss is already divided by the count of all ranks.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def run(call: Callable[..., Any], *args: Any) -> Any:
        outcome = gathered(call, *args)
        if not torch.is_grad_enabled():
            gathered.reshard()  # there is no backward pass to do it
        return outcome

    student.gathered = run


class Unsharded:
    """`student` has all parameters on this rank, as of the last `refresh`, for passes that other ranks do not make.
    Without `copied` it is the training student itself. Made before `shard`.
    """

    def __init__(self, learning: Student, copied: bool):
        self._learning = learning
        self._as_of = -1
        self.student = copy.deepcopy(learning) if copied else learning

    def at(self, step: int) -> Student:
        """The student as update `step` starts from it."""
        assert self.student is self._learning or self._as_of == step, f"gathered at {self._as_of}, used at {step}"
        self.student.before_step(step)
        return self.student

    def refresh(self, step: int) -> None:
        """Copy the parameters that update `step` starts from; all ranks must call."""
        if self.student is self._learning:
            return
        self._as_of = step
        shards = self._learning.tensors()
        for name, tensor in self.student.tensors().items():
            tensor.copy_(full_tensor(shards[name]))
